"""Requests that cannot be carried out are refused before torch is loaded, each in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning import request
from pruning.console import Reporter
from pruning.errors import NumberError
from pruning.export.formats import FORMATS, PrunedModel
from pruning.families import FAMILIES
from pruning.finite import check_numbers, check_tensors, is_finite
from pruning.forward.evaluator import Evaluator
from pruning.plan import Sublayer
from pruning.recovery.emulation import fit_plan
from pruning.variants.bias import BIAS
from tests.conftest import run_prune_export as run
from tests.conftest import tokens

QUICK = ["--calibration-tokens", "256", "--score-tokens", "128", "--sequence-length", "32", "--emulation", "low-rank",
         "--rank", "4"]  # fmt: skip

WITHOUT_TORCH = """
import sys
from pruning.cli import main

try:
    main()
finally:
    print(sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["list"], 0, ""),
        (["--help"], 0, ""),
        (["--help-all"], 0, ""),
        (["recipes"], 0, ""),
        (["recipes", "best"], 0, ""),
        (["recipes", "bset"], 2, "did you mean best?"),
        (["{model}", "--output", "out", "--recipe", "best", "--effort", "best"], 2, "both name a recipe; give one"),
        (["evaluate", "--help"], 0, ""),
        (["{model}", "--dry-run", "--calibration", "/no/such.txt"], 2, "/no/such.txt"),
        (["{model}", "--output", "out", "--attention", "0"], 2, "--attention 0 removes nothing"),
        (["{model}", "--output", "out", "--attention", "7"], 2, "has only 6"),
        (["{model}", "--output", "out", "--attention", "2", "--kv-budget", "50%"], 2, "give one"),
        (["{model}", "--output", "{model}"], 2, "is not empty"),
        (["{model}", "--output", "out", "--recipe", "recipe.yaml"], 2, "recipe.yaml:3: this is not YAML"),
        (
            ["{model}", "--output", "out", "--emulation", "none", "--task", "task.jsonl"],
            2,
            "task.jsonl:1: expected a context",
        ),
        (["score", "/no/such/model"], 2, "no such model '/no/such/model'"),
        (["sweep", "/no/such/model", "--output", "out"], 2, "no such model '/no/such/model'"),
        (["evaluate", "/no/such/model", "--recall", "2"], 2, "no such model '/no/such/model'"),
        (["evaluate", "{model}", "--text", "/no/such.txt"], 2, "/no/such.txt"),
        (["convert", "/no/such", "--to", "llama", "--output", "out"], 2, "/no/such has no readable pruning.json"),
    ],
)
def test_is_answered_without_torch(pico_directory, tmp_path, arguments, code, says):
    (tmp_path / "recipe.yaml").write_text("attention: 2\nkeep: [0, 1\n")
    (tmp_path / "task.jsonl").write_text('{"choices": []}\n')
    arguments = [argument.format(model=pico_directory()) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    *_, loaded = lines = done.stderr.strip().splitlines()
    assert loaded == "[]"
    assert done.returncode == code
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == (code != 0)
    assert says in "".join(errors)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def dense(pico_directory, tmp_path) -> Path:
    """A dense model directory to damage."""
    return Path(shutil.copytree(pico_directory(), tmp_path / "dense"))


def refused(monkeypatch, capsys, model, tmp_path, *arguments) -> str:
    """The one line of a request that ends with exit code 2 and writes nothing."""
    capsys.readouterr()
    assert run(monkeypatch, model, "--output", tmp_path / "out", *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    return errors[0]


def configure(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_quantised_model_is_refused(monkeypatch, capsys, dense, tmp_path):
    configure(dense, quantization_config={"quant_method": "awq", "bits": 4})
    for more in ([], ["--format", "plan"]):
        error = refused(monkeypatch, capsys, dense, tmp_path, *more)
        assert "is quantised (awq); for windows, choose a plan on the model that it was made from" in error
        assert f"prune-serve {dense} --plan DIR" in error
    configure(dense, quantization_config={"quant_method": "fp8"})
    for more in ([], ["--format", "plan", "--emulation", "low-rank"]):
        assert "(fp8); for windows, choose a plan with --format plan" in refused(
            monkeypatch, capsys, dense, tmp_path, *more
        )


def test_a_classifier_is_refused(monkeypatch, capsys, dense, tmp_path):
    configure(dense, architectures=["LlamaForSequenceClassification"])
    error = refused(monkeypatch, capsys, dense, tmp_path)
    assert "LlamaForSequenceClassification, which has no head that writes text" in error


def test_a_model_without_tokenizer_is_refused(monkeypatch, capsys, dense, tmp_path):
    for path in dense.glob("*token*"):
        path.unlink()
    assert "has no tokenizer; copy tokenizer.json" in refused(monkeypatch, capsys, dense, tmp_path)


def test_a_configuration_that_is_damaged_is_refused(monkeypatch, capsys, dense, tmp_path):
    (dense / "config.json").write_text('{"model_type": ')
    assert "config.json is not JSON" in refused(monkeypatch, capsys, dense, tmp_path)
    (dense / "config.json").write_text("[]")
    assert "names no model_type" in refused(monkeypatch, capsys, dense, tmp_path)


def test_a_shard_or_a_tensor_that_is_missing_is_named(monkeypatch, capsys, dense, text, tmp_path):
    index = dense / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert "lacks model-2.safetensors" in refused(monkeypatch, capsys, dense, tmp_path)
    index.unlink()
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.3.self_attn.q_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    error = refused(monkeypatch, capsys, dense, tmp_path, "--calibration", text, *QUICK)
    assert "lack lm_head.weight and 1 more" in error


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_weight_that_is_not_finite_is_named(monkeypatch, capsys, dense, text, tmp_path, value):
    name = "model.layers.3.mlp.up_proj.weight"
    tensors = load_file(dense / "model.safetensors")
    tensors[name][5, 7] = float(value)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--calibration", text, *QUICK]
    says = f"{name} holds 1 of {tensors[name].numel()} numbers that are NaN or infinite"
    assert says in refused(monkeypatch, capsys, dense, tmp_path, *arguments)
    assert run(monkeypatch, "score", dense, "--stream", *arguments) == 2
    assert says in capsys.readouterr().err
    assert run(monkeypatch, "evaluate", dense, "--text", text) == 2
    assert says in capsys.readouterr().err


def test_losses_that_are_not_finite_are_refused(monkeypatch, capsys, dense, text, tmp_path):
    """Weights whose products overflow float32 are finite themselves."""
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].sign() * 3e38
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--calibration", text, *QUICK]
    error = refused(monkeypatch, capsys, dense, tmp_path, *arguments)
    assert "leave-one-out on calibration text: attention.0 is nan" in error
    error = refused(monkeypatch, capsys, dense, tmp_path, *arguments, "--importance", "cosine")
    assert "held-out text: dense_loss is nan" in error
    assert run(monkeypatch, "evaluate", dense, "--text", text, "--window", 32) == 2
    assert "text: loss is nan" in capsys.readouterr().err


def test_what_is_finite():
    whole = torch.full((4,), 3e38)
    assert is_finite(whole)
    assert is_finite(torch.tensor([1]))
    assert is_finite(torch.full((4,), 60000.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))
    with pytest.raises(NumberError, match="file: b holds 1 of 2"):
        check_tensors([("a", whole), ("b", torch.tensor([0.0, float("nan")]))], "file")
    with pytest.raises(NumberError, match="loss is inf"):
        check_numbers({"loss": float("inf")}, "text")


@pytest.mark.parametrize("field", ["text", "content"])
def test_half_a_character_in_jsonl_is_named_with_its_line(monkeypatch, capsys, pico_directory, tmp_path, field):
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"{field}": "good"}}\n{{"{field}": "bad \\ud800"}}\n')
    error = refused(monkeypatch, capsys, pico_directory(), tmp_path, "--calibration", path)
    assert error.endswith(r"text.jsonl:2: half of a character, \ud800, stands alone; no text holds that")
    path.write_text('{"context": "a", "choices": ["b", "c \\udfff"], "label": 0}\n')
    arguments = ["--task", path, "--emulation", "none", "--attention", "1"]
    assert r"text.jsonl:1: half of a character, \udfff" in refused(
        monkeypatch, capsys, pico_directory(), tmp_path, *arguments
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"attention: 2\nkeep: {a\n", "recipe.yaml:3: this is not YAML"),
        (b"attention: 2\n\tffn: 2\n", "recipe.yaml:2: this is not YAML"),
        (b"- attention\n", "a recipe is lines of `key: value`"),
        (b"2: attention\n", "a recipe is lines of `key: value`"),
        (b"attention: \xff\n", "not UTF-8 text"),
        (b"a: &a [*a]\n", "recipe.yaml:1: unknown key 'a'"),
        (b"keep: &a [*a]\n", "recipe.yaml:1: keep: Input should be a valid integer"),
        (b"attention: 2\n\nkv_budgett: 50%\n", "recipe.yaml:3: unknown key 'kv_budgett'; did you mean kv_budget?"),
        (b"# mine\nrank: x\n", "recipe.yaml:2: rank: Input should be a valid integer"),
        (b"rank: 8\nkeep:\n  - 0\n  - y\n", "recipe.yaml:4: keep: Input should be a valid integer"),
        (b"rank: 8\nkv_budget: 0.5\n", "recipe.yaml:2: --kv-budget '0.5' is not a share"),
        (b"rank: 8\nattention: 0\n", "recipe.yaml:2: --attention 0 removes nothing"),
        (b"rank: 8\nimportance: cosin\n", "recipe.yaml:2: unknown importance metric 'cosin'; did you mean 'cosine'"),
        (b"rank: 8\nemulation: lowrank\n", "recipe.yaml:2: unknown emulation 'lowrank'; did you mean low-rank?"),
        (b"rank: 8\nkv_memory: 16\n", "recipe.yaml:2: --kv-memory '16' is not a size such as 16GiB"),
        (b"rank: 8\nseed: 1\nrank: 9\n", "recipe.yaml:3: rank is given twice, first in line 1"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_named_with_its_line(
    monkeypatch, capsys, pico_directory, tmp_path, content, says
):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert says in refused(monkeypatch, capsys, pico_directory(), tmp_path, "--recipe", path)


def test_what_nothing_foresaw_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(request, "checked_export", fail)
    assert run(monkeypatch, "a model", "--output", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    (kept,) = (tmp_path / "cache/shoal/errors").iterdir()
    assert (
        line
        == f"error: unexpected ZeroDivisionError: by nothing; this is a fault of Shoal, please report it with {kept}"
    )
    assert kept.read_text().startswith("prune-export 'a model' --output")
    assert "Traceback" in kept.read_text()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(monkeypatch, "a model", "--output", tmp_path / "out") == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_was_fitted_and_what_would_be_written_is_looked_at(monkeypatch, pico, tmp_path):
    model, family = pico("llama"), FAMILIES["llama"]
    evaluator, gone = Evaluator(model, family, tokens(rows=2)), {Sublayer(2, "attention"): "bias"}
    fit_bias = BIAS.fit

    def spoiled(job):
        module = fit_bias(job)
        module.bias.data[3] = float("nan")
        return module

    monkeypatch.setattr(type(BIAS), "fit", lambda self, job: spoiled(job))
    with pytest.raises(NumberError, match=r"what was fitted for attention.2: bias holds 1 of 128"):
        fit_plan(evaluator, gone, 4, Reporter())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    pruned = PrunedModel.of(model, family, tmp_path)
    with pytest.raises(NumberError, match=r"would be written: model.layers.1.mlp.up_proj.weight holds 1"):
        FORMATS["shoal"].write(pruned, tmp_path)
    assert not list(tmp_path.iterdir())
