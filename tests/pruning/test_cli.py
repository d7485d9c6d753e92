"""What a user sees: a checkpoint, or one line and exit code 2 with nothing written."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning import stages
from pruning.models.checkpoint import verify
from pruning.recipe import Recipe
from tests.conftest import run_prune_export as run

QUICK = [
    "--emulation",
    "low-rank",
    "--calibration-tokens",
    "512",
    "--score-tokens",
    "128",
    "--sequence-length",
    "64",
    "--rank",
    "8",
]


def test_prunes_a_directory(monkeypatch, pico_directory, text, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", text, "--attention", 2, *QUICK) == 0
    manifest = verify(output)
    assert len(manifest.removed) == 2
    assert manifest.sizes["kv_per_token"] * 6 == manifest.sizes["kv_per_token_dense"] * 4
    assert {"load", "calibrate", "score", "emulate"} <= set(manifest.stages)
    assert len(manifest.importance["leave-one-out"]) == 6
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert (output / "tokenizer.json").read_bytes() == (pico_directory() / "tokenizer.json").read_bytes()
    lines = capsys.readouterr().err.splitlines()
    (estimate,) = [number for number, line in enumerate(lines) if line.startswith("estimated time: ")]
    assert lines[estimate + 1].startswith("calibrate ...")
    made, quality, took, then = lines[-4:]
    assert made.startswith(f"wrote {output}: ")
    assert "KV cache of a request of 256 tokens" in made
    assert quality.startswith("perplexity on rows of 64 tokens")
    assert re.fullmatch(r"time: \d+ s \(estimated \d+ s\), peak memory \d+ MiB", took)
    assert then == f"serve it: prune-serve {output}"


def test_the_same_seed_gives_the_same_bytes(monkeypatch, pico_directory, text, tmp_path):
    for name in ("a", "b"):
        arguments = ["--calibration", text, "--attention", 2, "--ffn", 1, *QUICK]
        assert run(monkeypatch, pico_directory(), "--output", tmp_path / name, *arguments) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_recipe_file_is_read_and_flags_win(monkeypatch, pico_directory, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"attention: 3\nemulation: none\ncalibration: [{text}]\nsequence_length: 64\n"
                      "calibration_tokens: 512\nscore_tokens: 128\n")  # fmt: skip
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory(), "--recipe", recipe, "--attention", 1, "--output", output) == 0
    manifest = verify(output)
    assert list(manifest.removed.values()) == ["none"]
    assert manifest.recipe["attention"] in (1, "1")


def test_whole_blocks_go(monkeypatch, pico_directory, text, tmp_path):
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory(), "--output", output, "--calibration", text, "--blocks", 2, *QUICK) == 0
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.slow
def test_an_ordinary_checkpoint_needs_nothing_of_ours(monkeypatch, pico_directory, text, tmp_path):
    output = tmp_path / "out"
    arguments = ["--calibration", text, "--blocks", 2, "--format", "llama", *QUICK]
    assert run(monkeypatch, pico_directory(), "--output", output, *arguments) == 0
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model, loading = AutoModelForCausalLM.from_pretrained({str(output)!r}, output_loading_info=True)\n"
        "assert type(model).__name__ == 'LlamaForCausalLM' and len(model.model.layers) == 4\n"
        "assert not any(loading[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), loading\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verify(output)


def test_dry_run_writes_nothing(monkeypatch, pico_directory, text, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--dry-run", "--output", output, "--calibration", text, "--attention", "33%", *QUICK]
    assert run(monkeypatch, pico_directory(), *arguments) == 0
    assert "KV cache" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--attention", "7"], "has only 6"),
        (["--attention", "6", "--emulation", "none"], "at least one must stay"),
        (["--attention", "0"], "removes nothing"),
        (["--attention", "101%"], "over 100%"),
        (["--attention", "2", "--importance", "cosin"], "did you mean 'cosine'"),
        (["--attention", "2", "--emulation", "magik"], "unknown emulation 'magik'"),
        (["--attention", "2", "--emulation", "lowrank"], "did you mean low-rank?"),
        (["--attention", "2", "--format", "llama"], "whole blocks only"),
        (["--attention", "2", "--rank", "4096"], "--rank 4096"),
        (["--attention", "2", "--calibration", "/no/such/file.txt"], "/no/such/file.txt"),
        (["--attention", "2", "--calibration-tokens", "1000000"], "fewer than"),
        (["--attention", "2", "--recipe", "/no/such.yaml"], "does not exist"),
        (["--attentoin", "2"], "--attention"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, pico_directory, text, tmp_path, capsys, arguments, says):
    if "--calibration" not in arguments:
        arguments = [*arguments, "--calibration", str(text)]
    if "--calibration-tokens" not in arguments:
        arguments = [*arguments, "--calibration-tokens", "512"]
    output = tmp_path / "out"
    assert run(monkeypatch, pico_directory(), "--output", output, *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_keys_are_refused(monkeypatch, pico_directory, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("attention: 2\nrnak: 8\n")
    assert run(monkeypatch, pico_directory(), "--recipe", recipe, "--output", tmp_path / "out") == 2
    assert "rnak" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["/no/such/model", "no-such-model-anywhere"])
def test_no_such_model(monkeypatch, tmp_path, capsys, model):
    assert run(monkeypatch, model, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: no such model {model!r}")


def test_an_unsupported_family_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert run(monkeypatch, tmp_path, "--output", tmp_path / "out") == 2
    assert "'mamba' is not supported" in capsys.readouterr().err


def test_output_that_is_not_empty_stays_as_it_is(monkeypatch, pico_directory, tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert run(monkeypatch, pico_directory(), "--output", tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_write_that_fails_leaves_nothing(monkeypatch, pico_directory, text, tmp_path, capsys):
    """A limit on file size stands for a disk that fills up while the weights are written."""
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        code = run(
            monkeypatch, pico_directory(), "--output", tmp_path / "out", "--calibration", text, "--attention", 2, *QUICK
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert "error: cannot write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys; sys.argv = ['prune-export', '--help']\n"
        "from pruning.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--calibration" in done.stdout
    assert "--heal" not in done.stdout
    assert time.perf_counter() - start < 10


def options(printed: str) -> list[str]:
    """Names of the options that a help page has a line for."""
    return re.findall(r"^│ +(?:MODEL )?(--[a-z-]+)", printed.replace("*", " "), re.MULTILINE)


def test_help_is_short_and_in_the_order_of_use_and_help_all_has_every_flag(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    model, *short = options(printed)
    assert model == "--model"
    assert short == [
        "--output", "--kv-budget", "--weight-budget", "--max-loss-increase", "--target-tokens", "--kv-memory",
        "--context", "--task", "--calibration", "--effort", "--recipe", "--dry-run",
    ]  # fmt: skip
    assert "Example: prune-export smollm2-135m --output" in printed
    assert "--help-all shows every option" in printed
    assert run(monkeypatch, "--help-all") == 0
    every = set(options(capsys.readouterr().out))
    assert every >= {f"--{key.replace('_', '-')}" for key in Recipe.model_fields} | {*short, "--overwrite"}
    assert run(monkeypatch, "score", "--help-all") == 0
    assert "--heal-lora-rank" in options(capsys.readouterr().out)


def test_scores_are_printed_and_saved_and_nothing_else_is_written(monkeypatch, pico_directory, text, tmp_path, capsys):
    saved = tmp_path / "scores.json"
    arguments = ["--calibration", text, "--calibration-tokens", "256", "--sequence-length", "32"]
    model = str(pico_directory("llama"))
    for flags in ([], ["--stream"]):
        command = ["score", model, *arguments, "--units", "attention", "block", "--output", str(saved), *flags]
        assert run(monkeypatch, *command) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 13
        document = json.loads(saved.read_text())
        table = document["importance"]["leave-one-out"]
        assert set(table) == {f"{kind}.{block}" for kind in ("attention", "block") for block in range(6)}
        assert printed[1].split()[0] == min(table, key=table.get)
        assert set(document["importance"]) == {"leave-one-out", "leave-one-out, standard error"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("flags", "attention", "sublayers"),
    [
        (["--kv-budget", "66%", "--window-by", "layer"], 3, 3),
        (["--attention", "2", "--ffn", "1", "--search", "greedy", "--importance", "kl"], 2, 3),
        (["--sublayers", "3", "--search", "evolutionary", "--generations", "1", "--offspring", "4"], None, 3),
        (["--attention", "2", "--search", "policy-gradient", "--generations", "1", "--offspring", "4"], 2, 2),
        (["--attention", "2", "--search", "greedy", "--recovery-aware", "--rank", "4"], 2, 2),
        (["--attention", "2", "--search", "exchange", "--recovery-aware", "--rank", "4", "--copying", "0.5"], 2, 2),
        (["--blocks", "2", "--search", "consecutive"], 2, 4),
    ],
)
def test_searches_and_budgets(monkeypatch, pico_directory, text, tmp_path, flags, attention, sublayers):
    out = tmp_path / "out"
    arguments = ["--calibration", text, "--calibration-tokens", "256", "--sequence-length", "32", "--rank", "8"]
    arguments = [a for i, a in enumerate(arguments) if "--rank" not in flags or i < 6]
    assert run(monkeypatch, str(pico_directory("llama")), "--output", str(out), *arguments, *flags) == 0
    removed = json.loads((out / "pruning.json").read_text())["removed"]
    assert len(removed) == sublayers
    assert attention is None or sum(name.startswith("attention") for name in removed) == attention
    assert not list(tmp_path.glob(".*"))


def test_a_search_fits_on_a_part_of_the_text_and_in_the_arithmetic_asked_for(
    monkeypatch, pico_directory, text, tmp_path
):
    asked, fit = [], stages.fit_candidates

    def spied(evaluator, *rest):
        asked.append((sum(map(len, evaluator.batches)), torch.is_autocast_enabled("cpu")))
        return fit(evaluator, *rest)

    monkeypatch.setattr(stages, "fit_candidates", spied)
    monkeypatch.setattr(stages, "SEARCH_FIT_TOKENS", 96)
    flags = ["--attention", "2", "--search", "greedy", "--recovery-aware", "--copying", "0.5", "--rank", "4"]
    arguments = ["--calibration", text, "--calibration-tokens", "512", "--sequence-length", "32", *flags]
    arguments += ["--fit-precision", "bfloat16"]
    assert run(monkeypatch, str(pico_directory("llama")), "--output", str(tmp_path / "out"), *arguments) == 0
    assert set(asked) == {(3, True)}
    scores = verify(tmp_path / "out").importance
    one, two, copied, copied_too = (
        scores[f"leave-one-out ({name})"] for name in ("half 1", "half 2", "half 1, repeated", "half 2, repeated")
    )
    for unit, value in scores["leave-one-out"].items():
        assert value == pytest.approx((one[unit] + two[unit] + 0.5 * (copied[unit] + copied_too[unit])) / 3)


@pytest.mark.slow
def test_budgets_in_weights_and_in_loss_hold(monkeypatch, pico_directory, text, tmp_path):
    arguments = ["--calibration", text, "--calibration-tokens", "256", "--sequence-length", "32"]
    model = str(pico_directory("llama"))
    for name, flags in {
        "0.8": ["--weight-budget", "80%", "--rank", "2"],
        "0.86": ["--weight-budget", "86%", "--rank", "32", "--fuse"],
        "loss": ["--max-loss-increase", "0.5", "--rank", "2"],
    }.items():
        out = tmp_path / name
        assert run(monkeypatch, model, "--output", str(out), *arguments, *flags) == 0
        manifest = json.loads((out / "pruning.json").read_text())
        sizes, quality = manifest["sizes"], manifest["quality"]
        assert manifest["removed"]
        if name != "loss":
            assert 0.7 < sizes["weights"] / sizes["weights_dense"] <= float(name)
        else:
            assert quality["pruned_loss"] - quality["dense_loss"] <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kv-budget", "66%", "--attention", "2"], "--kv-budget and --attention"),
        (["--kv-budget", "120%"], "not a share"),
        (["--weight-budget", "1%"], "out of reach"),
        (["--max-loss-increase", "0.1", "--search", "evolutionary"], "needs an order of removal"),
        (["--search", "consecutive"], "--blocks N"),
        (["--sublayers", "3", "--ffn", "1"], "--sublayers ranks both kinds"),
        (["--recovery-aware", "--emulation", "none"], "choose an --emulation"),
        (["--copying", "0.5", "--importance", "cosine"], "leave --copying out"),
        (["--copying", "-1"], "greater than or equal to 0"),
        (["--stream", "--fuse"], "--stream holds one block at a time, and"),
    ],
)
def test_requests_that_contradict_themselves(monkeypatch, pico_directory, text, tmp_path, capsys, flags, says):
    out = tmp_path / "out"
    arguments = ["--calibration", text, "--calibration-tokens", "256", "--sequence-length", "32", "--rank", "2"]
    assert run(monkeypatch, str(pico_directory("llama")), "--output", str(out), *arguments, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not out.exists()


KILLED_AFTER = """
import os, signal
from pruning import cli, workdir

keep, count = workdir.Journal.keep, 0

def keep_and_die(journal, key, value):
    global count
    keep(journal, key, value)
    count += 1
    if count == {entries}:
        os.kill(os.getpid(), signal.SIGKILL)

workdir.Journal.keep = keep_and_die
try:
    cli.main()
finally:
    print(count)
"""


@pytest.mark.slow
def test_a_killed_recovery_aware_search_goes_on_and_ends_with_the_same_bytes(pico_directory, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Of all sad words of tongue or pen, the saddest are these: it might have been. " * 60)
    arguments = ["--calibration", text, other, "--attention", "5", "--search", "greedy", "--recovery-aware", *QUICK]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def export(name, entries):
        command = [sys.executable, "-c", KILLED_AFTER.format(entries=entries), pico_directory(), "--output"]
        return subprocess.run([*command, tmp_path / name, *arguments], env=environment, capture_output=True, text=True)

    journals = tmp_path / "cache/shoal/journals"
    whole = export("whole", 0)
    assert whole.returncode == 0, whole.stderr
    values = int(whole.stdout.split()[-1])
    killed_at = values * 4 // 5  # after the adapters were fitted anew
    assert export("killed", killed_at).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert sum(len(path.read_text().splitlines()) for path in journals.iterdir()) == killed_at
    resumed = export("killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout.split()[-1]) == values - killed_at
    assert not list(journals.iterdir())
    manifests = [verify(tmp_path / name) for name in ("whole", "killed")]
    assert manifests[0].importance == manifests[1].importance
    assert manifests[0].files["model.safetensors"] == manifests[1].files["model.safetensors"]
