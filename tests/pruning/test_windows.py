"""Windows from the command line: what a budget means, how layers are chosen, what is measured and written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.budget import check, counts, resolved
from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling
from pruning.models.checkpoint import verify
from pruning.models.memory import Work, needed
from pruning.models.plan_file import PLAN, read_plan
from pruning.models.weight_files import weight_files
from pruning.plan import Unit, layers_within
from pruning.recipe import Recipe
from pruning.search.selection import Judge, score
from pruning.texts.calibration import from_files
from pruning.workdir import cache_directory
from tests.conftest import losses, pico_model, pico_tokenizer, tokens
from tests.conftest import run_prune_export as run

WINDOWS = ["--context", "256", "--kv-budget", "60%"]
SMALL = [*WINDOWS, "--calibration-tokens", "512", "--held-out-tokens", "256"]


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    return path


def test_a_budget_limits_the_least_layers_that_meet_it():
    for budget in (0.15, 0.3, 0.5, 0.9):
        for left in (0.0, 1 / 8, 1 / 16):
            count = layers_within(budget, 30, left)
            assert (30 - count + count * left) / 30 <= budget + 1e-9
            assert count == 1 or (31 - count + (count - 1) * left) / 30 > budget


def test_the_defaults_keep_a_third_of_the_cache_at_most():
    recipe = resolved(Recipe(), 8192)
    assert (recipe.emulation, recipe.context, recipe.window) == ("window", 8192, 1024)
    limited = counts(recipe, 30).attention
    assert (30 - limited + limited / 8) / 30 <= 0.3
    assert resolved(Recipe(ffn=3), 8192).emulation == "low-rank"


def test_a_small_budget_gets_a_smaller_window_so_that_some_heads_stay_full():
    budgets = ("50%", "20%", "15%", "10%")
    one = {budget: resolved(Recipe(kv_budget=budget, window_sizes="one"), 8192).window for budget in budgets}
    assert one == {"50%": 1024, "20%": 1024, "15%": 704, "10%": 448}
    several = {budget: resolved(Recipe(kv_budget=budget), 8192).window for budget in budgets}
    assert several == {"50%": 1024, "20%": 1024, "15%": 1024, "10%": 640}
    asked = resolved(Recipe(kv_budget="10%", window=512), 8192)
    assert (asked.window, asked.window_sizes) == (512, "one")
    assert resolved(Recipe(kv_budget="10%"), 256).window == 21
    assert resolved(Recipe(kv_budget="10%", search="greedy"), 8192).window_sizes == "one"
    for budget, size in (("15%", 704), ("10%", 448)):
        assert 90 - layers_within(float(budget[:-1]) / 100, 90, size / 8192) >= 4


def test_a_context_the_model_cannot_take_and_a_window_as_long_are_refused():
    with pytest.raises(RecipeError, match="at most 2048"):
        resolved(Recipe(context=4096), 2048)
    with pytest.raises(RecipeError, match="nothing is saved"):
        resolved(Recipe(context=1024, window=1024), 2048)
    with pytest.raises(RecipeError, match="smaller --window"):
        counts(resolved(Recipe(kv_budget="10%", window=1024), 8192), 30)


def test_heads_are_chosen_by_gates_or_refused():
    for other in ({"importance": "leave-one-out"}, {"search": "greedy"}, {"attention": 3}, {"emulation": "low-rank"}):
        with pytest.raises(RecipeError, match="--window-by head needs"):
            check(Recipe(window_by="head", **other))
    check(Recipe(window_by="head", kv_budget="40%"))


def test_prunes_to_windows_and_measures_at_the_context(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", long_text, *WINDOWS) == 0
    manifest = verify(output)
    assert set(manifest.removed.values()) == {"window"}
    assert manifest.sizes["kv_request"] <= 0.6 * manifest.sizes["kv_request_dense"]
    assert manifest.quality["row_tokens"] == 256
    assert manifest.quality["codes"]["asked"] == manifest.quality["codes_dense"]["asked"] > 0
    assert manifest.recipe["window"] == 32
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    sizes = {manifest.recipe["window"], *manifest.quality.get("windows", {}).values()}
    assert all(str(size) in (output / "README.md").read_text() for size in sizes)
    assert "limited to the last " in (output / "README.md").read_text()
    assert "codes hidden in 128 tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "importance"),
    [("greedy", "leave-one-out"), ("exchange", "leave-one-out"), ("rank", "taylor"), ("rank", "leave-one-out")],
)
def test_searches_and_metrics_see_windows_in_place(
    monkeypatch, pico_directory, long_text, tmp_path, search, importance
):
    output = tmp_path / "out"
    how = ["--importance", importance, "--search", search]
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", long_text, *WINDOWS, *how) == 0
    assert set(verify(output).removed.values()) == {"window"}


@pytest.mark.slow
def test_layers_that_slide_by_design_stay(monkeypatch, pico_directory, long_text, tmp_path):
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory("gemma2"), "--output", output, "--calibration", long_text, *WINDOWS) == 0
    config = pico_model("gemma2").config
    limited = {int(name.partition(".")[2]) for name in verify(output).removed}
    assert limited
    assert all(config.layer_types[block] == "full_attention" for block in limited)


def test_what_a_judge_gains_is_no_reason_to_limit_a_layer():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(2, 24))
    units = [Unit(block, "attention") for block in range(6)]
    free, clipped = (
        score([Judge("text", evaluator, gains=gains)], units, "leave-one-out", Sampling(0, 2, 2), Reporter())[""]
        for gains in (True, False)
    )
    assert min(free.values.values()) < 0
    assert clipped.values == {unit: max(0.0, value) for unit, value in free.values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("heal", ["adapters", "lora"])
def test_limited_layers_are_healed_with_windows_for_the_rows(monkeypatch, pico_directory, long_text, tmp_path, heal):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "out"
    how = ["--heal", heal, "--heal-steps", 4, "--heal-batch-tokens", 256, "--window", 16, "--emulation", "window"]
    arguments = ["--calibration", long_text, *WINDOWS, "--sequence-length", 128, "--calibration-tokens", 512, *how]
    assert run(monkeypatch, pico_directory(), "--output", output, *arguments) == 0
    manifest = verify(output)
    assert manifest.quality["healing"]["steps"] == 4
    sizes = {block["attention"]["window"]["size"] for block in block_configs(output) if "window" in block["attention"]}
    assert sizes == {16}
    dense = AutoModelForCausalLM.from_pretrained(pico_directory())
    healed = AutoModelForCausalLM.from_pretrained(output)
    layer = min(int(name.partition(".")[2]) for name in manifest.removed)
    same = torch.equal(
        dense.model.layers[layer].self_attn.q_proj.weight, healed.model.layers[layer].self_attn.q_proj.weight
    )
    assert same == (heal == "adapters" or not manifest.quality["healing"]["improved"])


def block_configs(directory):
    return json.loads((directory / "config.json").read_text())["block_configs"]


def test_a_sweep_refuses_windows(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    command = ["sweep", pico_directory(), "--output", tmp_path / "out", "--calibration", long_text]
    assert run(monkeypatch, *command, "--emulations", "window") == 2
    assert "a sweep removes attention" in capsys.readouterr().err


def test_plans_judged_by_tasks_are_still_of_adapters():
    assert Recipe(task=["questions.jsonl"]).kind == "low-rank"


def test_a_task_is_judged_with_windows_in_place(monkeypatch, pico_directory, long_text, tmp_path):
    task, output = tmp_path / "task.txt", tmp_path / "out"
    task.write_text("A lazy fox sleeps under the quick brown dog, now and then; and so on it goes. " * 100)
    how = ["--emulation", "window", "--task", task, "--score-tokens", 512, "--seed", 3]
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", long_text, *WINDOWS, *how) == 0
    manifest = verify(output)
    assert manifest.recipe["importance"] == "leave-one-out"
    pruned, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (output, pico_directory()))
    rows = from_files([task], AutoTokenizer.from_pretrained(output), 512, 256, 3)
    with torch.inference_mode():
        increase = losses(pruned(rows).logits, rows).mean() - losses(dense(rows).logits, rows).mean()
    assert manifest.quality["tasks"]["chosen plan"]["task.txt"] == pytest.approx(float(increase), abs=1e-5)


def test_a_task_that_fits_into_the_windows_is_refused(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    task, output = tmp_path / "task.jsonl", tmp_path / "out"
    task.write_text(json.dumps({"context": "The fox is", "choices": [" red", " blue"], "label": 0}) + "\n")
    how = ["--emulation", "window", "--task", task]
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", long_text, *WINDOWS, *how) == 2
    assert "fit into the windows of 32 tokens" in capsys.readouterr().err
    assert not output.exists()


def test_scores_of_windows_are_of_attention(monkeypatch, pico_directory, long_text, capsys):
    words = ["score", pico_directory(), "--emulation", "window", "--calibration", long_text, "--context", 256]
    assert run(monkeypatch, *words, "--units", "ffn") == 2
    assert "--units ffn: --emulation window is for attention only" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert printed.count("attention.") == 6
    assert "ffn." not in printed


def made_by(monkeypatch, model, output, *flags):
    shutil.rmtree(cache_directory() / "searches", ignore_errors=True)  # what was measured would be known
    assert run(monkeypatch, model, "--output", output, *flags) == 0
    return output


@pytest.mark.parametrize(("form", "dtype"), [("shoal", "bfloat16"), ("plan", "float32")])
def test_a_streamed_plan_is_that_of_the_whole_model(monkeypatch, long_text, tmp_path, form, dtype):
    dense = tmp_path / "dense"
    pico_model("llama").to(getattr(torch, dtype)).save_pretrained(dense, max_shard_size="300KB")
    pico_tokenizer().save_pretrained(dense)
    flags = ["--calibration", long_text, *SMALL, "--format", form]
    whole = made_by(monkeypatch, dense, tmp_path / "whole", *flags)
    streamed = made_by(monkeypatch, dense, tmp_path / "streamed", *flags, "--stream")
    first, second = read(whole), read(streamed)
    assert second.removed == first.removed
    assert second.sizes == first.sizes
    assert second.base == first.base
    assert second.quality["full_heads"] == first.quality["full_heads"]
    for name in ("dense_loss", "pruned_loss"):
        assert second.quality[name] == pytest.approx(first.quality[name], abs=1e-6)
    assert second.quality["codes"] == pytest.approx(first.quality["codes"], rel=1e-5)
    (scores,) = first.importance.values()
    assert next(iter(second.importance.values())) == pytest.approx(scores, rel=1e-4, abs=1e-7)
    if form == "shoal":
        names = sorted(path.name for path in dense.glob("*.safetensors"))
        assert len(names) > 1
        assert all((streamed / name).samefile(dense / name) for name in names)


def read(directory):
    return read_plan(directory / PLAN).document.manifest if (directory / PLAN).exists() else verify(directory)


def test_what_cannot_stream_is_refused_in_one_line(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    base = ["--calibration", long_text, "--context", "256", "--output", tmp_path / "out", "--stream"]
    for flags, why in (
        (["--compensate", "--emulation", "window"], "--compensate changes weights beside windows"),
        (["--heal", "adapters", "--heal-steps", "1"], "--heal adapters trains"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 writes weights anew"),
    ):
        assert run(monkeypatch, pico_directory(), *base, *flags) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert why in line
    assert not (tmp_path / "out").exists()


def test_memory_is_planned_before_it_is_used(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    base = ["--calibration", long_text, *SMALL]
    memory = {}
    for number, given in enumerate(("8GiB", "600MiB")):
        code = run(monkeypatch, pico_directory(), "--output", tmp_path / str(number), *base, "--memory", given)
        memory[given] = code, capsys.readouterr().err
    assert memory["8GiB"][0] == 0
    assert "the model is loaded as a whole" in memory["8GiB"][1]
    assert memory["600MiB"][0] == 2
    (line,) = [line for line in memory["600MiB"][1].splitlines() if line.startswith("error:")]
    assert "--memory 600MiB: about" in line
    assert not (tmp_path / "1").exists()
    assert run(monkeypatch, pico_directory(), "--output", tmp_path / "2", *base, "--memory", "much") == 2
    assert "--memory 'much' is not a size" in capsys.readouterr().err


def test_a_model_larger_than_the_memory_is_streamed(monkeypatch, long_text, tmp_path, capsys):
    dense = tmp_path / "dense"
    pico_model("llama", num_hidden_layers=24, hidden_size=256, intermediate_size=2048).save_pretrained(dense)
    pico_tokenizer().save_pretrained(dense)
    needs = needed(weight_files(dense), FAMILIES["llama"], Work(4, 256, 512, 256, 256, 2048, 24, 4))
    assert needs.streamed < needs.whole - 2**20
    between = f"{(needs.streamed + needs.whole) / 2 / 2**20:.0f}MiB"
    flags = ["--calibration", long_text, *SMALL, "--memory", between, "--format", "plan"]
    assert run(monkeypatch, dense, "--output", tmp_path / "out", *flags) == 0
    assert "blocks are read from disk one at a time" in capsys.readouterr().err
    assert run(monkeypatch, dense, "--output", tmp_path / "no", *flags, "--heal", "adapters") == 2
    assert "--heal adapters trains, which needs the whole model; give more memory" in capsys.readouterr().err


def test_fewer_held_out_tokens_than_a_context_shorten_the_windows(monkeypatch, pico_directory, long_text, tmp_path):
    flags = ["--calibration", long_text, *WINDOWS, "--calibration-tokens", "512", "--held-out-tokens", "128"]
    quality = read(made_by(monkeypatch, pico_directory(), tmp_path / "out", *flags)).quality
    assert quality["row_tokens"] == 128
    if "codes" in quality:
        assert quality["codes"]["length"] == 64


def test_what_stays_is_refitted_beside_windows_for_the_rows(monkeypatch, pico_directory, long_text, tmp_path):
    output = tmp_path / "out"
    how = ["--emulation", "window", "--context", "256", "--window", "64", "--sequence-length", "64", "--compensate"]
    how += ["--kv-budget", "30%", "--calibration", long_text]
    assert run(monkeypatch, pico_directory(), "--output", output, *how) == 0
    mine, theirs = (load_file(path / "model.safetensors") for path in (output, pico_directory()))
    changed = {name for name, tensor in theirs.items() if not torch.equal(tensor, mine[name])}
    assert any(name.endswith("mlp.down_proj.weight") for name in changed)
    assert not any("self_attn" in name for name in changed)
    entries = [block["attention"] for block in json.loads((output / "config.json").read_text())["block_configs"]]
    assert {entry["window"]["size"] for entry in entries if "window" in entry} == {64}
