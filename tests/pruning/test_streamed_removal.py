"""Removal with adapters from a model that is read block by block: the plan, the weights and the losses of the whole."""

import json

import pytest
import torch
from safetensors import safe_open

from pruning.console import Reporter
from pruning.evaluation.evaluate import load
from pruning.families import FAMILIES
from pruning.forward.streaming import Streamed
from pruning.models.checkpoint import verify
from pruning.models.memory import FitWork, needed
from pruning.models.weight_files import INDEX, weight_files
from tests.conftest import pico_model, pico_tokenizer
from tests.conftest import run_prune_export as run

QUICK = ["--calibration-tokens", 256, "--score-tokens", 64, "--sequence-length", 32, "--rank", 4]
ADAPTERS = ["--importance", "cosine", "--emulation", "low-rank"]


def weights(directory):
    """Name -> tensor, by the index where there is one."""
    index = directory / INDEX
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    found = {}
    for file in files:
        with safe_open(directory / file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def saved(directory, model_type="llama", dtype=torch.float32, **sizes):
    pico_model(model_type, **sizes).to(dtype).save_pretrained(directory, max_shard_size="300KB")
    pico_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("llama", ["--attention", 2, "--emulation", "low-rank", "--importance", "cosine", "--recalibrate"]),
        ("llama", ["--attention", 1, "--blocks", 2, "--emulation", "context", "--importance", "relative-l2",
                   "--compensate"]),
        ("cohere", ["--sublayers", 3, "--emulation", "bias", "--importance", "leave-one-out"]),
        ("gemma2", ["--attention", 2, "--emulation", "linear", "--importance", "bip"]),
        ("llama", ["--attention", 2, "--emulation", "self-only", "--search", "greedy"]),
    ],
)  # fmt: skip
def test_streamed_removal_is_that_of_the_whole_model(monkeypatch, pico_directory, text, tmp_path, model_type, flags):
    dense = pico_directory(model_type)
    words = [dense, "--calibration", text, *QUICK, *flags]
    assert run(monkeypatch, *words, "--output", tmp_path / "whole") == 0
    assert run(monkeypatch, *words, "--output", tmp_path / "streamed", "--stream") == 0
    whole, streamed = (verify(tmp_path / name) for name in ("whole", "streamed"))
    assert streamed.removed == whole.removed
    assert streamed.sizes == whole.sizes
    assert streamed.base == whole.base
    for name in ("dense_loss", "removed_loss", "pruned_loss"):  # measured together: products of other shapes
        assert streamed.quality[name] == pytest.approx(whole.quality[name], abs=1e-6)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "streamed")
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_weights_are_copied_in_their_own_dtype_and_untouched_files_linked(monkeypatch, text, tmp_path):
    dense = saved(tmp_path / "dense", dtype=torch.bfloat16)
    words = [dense, "--calibration", text, *QUICK, *ADAPTERS, "--attention", 1]
    assert run(monkeypatch, *words, "--output", tmp_path / "out", "--stream") == 0
    before, after = weights(dense), weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if ".emulation." not in name)
    (gone,) = verify(tmp_path / "out").removed
    block = f"model.layers.{gone.partition('.')[2]}.self_attn"
    assert {name for name in after if ".emulation." in name} == {
        f"{block}.emulation.{name}" for name in ("down.weight", "up.weight", "up.bias")
    }
    assert not any(name.startswith(f"{block}.q_proj") for name in after)
    files = weight_files(dense).names
    linked = [name for name in files if (tmp_path / "out" / name).exists()]
    linked = [name for name in linked if (tmp_path / "out" / name).samefile(dense / name)]
    assert len(linked) >= len(files) - 2 > 1  # attention of one block lies in two files at most
    loaded = load(str(tmp_path / "out"), "auto", "cpu", Reporter())
    with torch.no_grad():
        assert loaded.model(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_a_fit_holds_one_block_at_a_time(monkeypatch, pico_directory, text, tmp_path):
    held = []
    stock = Streamed._put

    def watched(residency, name, tensor):
        stock(residency, name, tensor)
        there = {n.split(".")[2] for n, p in residency._model.named_parameters() if "layers." in n and not p.is_meta}
        held.append(len(there))

    monkeypatch.setattr(Streamed, "_put", watched)
    words = [pico_directory("llama"), "--calibration", text, *QUICK, "--attention", 2, "--importance", "cosine"]
    assert run(monkeypatch, *words, "--emulation", "low-rank", "--output", tmp_path / "out", "--stream") == 0
    assert max(held) == 1


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--emulation", "kv-share"], "--emulation kv-share reads several blocks at a time"),
        (["--fuse"], "--fuse makes FFNs anew"),
        (["--heal", "adapters", "--heal-steps", 1], "--heal adapters trains"),
        (["--format", "nemotron-nas", "--emulation", "none"], "--format nemotron-nas writes weights anew"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 writes weights anew"),
        (["--recovery-aware"], "--recovery-aware fits emulations"),
    ],
)
def test_removal_that_cannot_stream_is_refused_in_one_line(
    monkeypatch, pico_directory, text, tmp_path, capsys, flags, why
):
    words = [pico_directory("llama"), "--calibration", text, *QUICK, "--attention", 2, "--output", tmp_path / "out"]
    flags = flags if "--emulation" in flags else [*flags, "--emulation", "low-rank"]
    assert run(monkeypatch, *words, "--stream", *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert why in line
    assert not (tmp_path / "out").exists()


def test_the_memory_of_a_fit_counts_its_statistics(monkeypatch, text, tmp_path, capsys):
    dense = saved(tmp_path / "dense", num_hidden_layers=24, hidden_size=256, intermediate_size=2048)

    def needs(**how):
        work = FitWork(4, 128, 512, 256, 256, 2048, 24, 4, **how)
        return needed(weight_files(dense), FAMILIES["llama"], work)

    fit = needs()
    assert fit.streamed < fit.whole - 2**20
    assert needs(sources=1).streamed - fit.streamed > 8 * 8 * (512**2 - 256**2)
    assert needs(compensated=True).streamed - fit.streamed > 8 * 8 * (2048**2 - 256**2)
    words = [dense, "--calibration", text, *QUICK, *ADAPTERS, "--attention", 2]
    between = f"{(fit.streamed + fit.whole) / 2 / 2**20:.0f}MiB"
    assert run(monkeypatch, *words, "--output", tmp_path / "out", "--memory", between) == 0
    assert "blocks are read from disk one at a time" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--output", tmp_path / "no", "--memory", "500MiB") == 2
    assert "give more, or lower --calibration-tokens" in capsys.readouterr().err
