"""Batches on disk are the batches in memory, fits with them the same fits, and nothing stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pruning
from pruning.console import Reporter
from pruning.errors import StorageError
from pruning.families import FAMILIES
from pruning.forward import spill
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import Spilled, batches
from pruning.forward.walk import enter
from pruning.plan import KINDS, Sublayer
from pruning.recovery import compensation
from pruning.recovery.emulation import fit_candidates, recover
from pruning.recovery.fuse import fuse
from tests.conftest import tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "shoal" / "spill"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_read_is_what_was_written(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in [(4, 8, 3), (4, 8, 3), (1, 8, 3)]]
    tensors[1] = tensors[1].transpose(0, 1).contiguous().transpose(0, 1)
    spilled = Spilled()
    for tensor in tensors:
        spilled.append(tensor)
    twin = spilled.copy()
    spilled[1] = tensors[0]
    assert len(spilled) == 3
    assert all(torch.equal(*pair) for pair in zip(twin, tensors, strict=True))
    assert all(torch.equal(*pair) for pair in zip(spilled, [tensors[0], tensors[0], tensors[2]], strict=True))
    assert torch.equal(spilled[-1], tensors[2])
    assert [tensor.dtype for tensor in spilled[1:]] == [dtype, dtype]


def test_only_more_than_the_budget_is_written(monkeypatch, cache):
    monkeypatch.setattr(spill, "BUDGET_BYTES", 100)
    assert batches(50, copies=2) == []
    assert not cache.exists()
    assert isinstance(batches(51, copies=2), Spilled)


def test_a_disk_that_is_too_full_is_refused_in_one_line(cache):
    with pytest.raises(StorageError, match=r"keeps 1073741824 MiB in .*shoal/spill but only \d+ MiB are free") as error:
        Spilled(2**50)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "shoal").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        Spilled()


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_storage():
    spilled = Spilled()
    spilled._file = open("/dev/full", "r+b")  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        spilled.append(torch.zeros(4))
    with pytest.raises(OSError, match="No space left"):
        spilled._file.close()


def attention(*blocks: int, kind: str = "low_rank"):
    return {Sublayer(block, "attention"): kind for block in blocks}


WHOLE = {Sublayer(block, kind): "none" for block in (2, 3) for kind in KINDS}


def tensors_of(recovery):
    """Everything that a fit gave, by name."""
    modules = {str(s): m for s, m in recovery.emulations.items() if m is not None}
    return recovery.weights | {f"{s}.{n}": t for s, m in modules.items() for n, t in m.state_dict().items()}


def plain(evaluator):
    return tensors_of(recover(evaluator, {**attention(1, 3), Sublayer(4, "ffn"): "bias"}, 4, Reporter()))


def recalibrated(evaluator):
    return tensors_of(recover(evaluator, {**WHOLE, **attention(4)}, 4, Reporter(), recalibrated=True))


def with_context(evaluator):
    return tensors_of(recover(evaluator, attention(1, 3, 4, kind="context"), 4, Reporter(), sources=2))


def independent(evaluator):
    return tensors_of(recover(evaluator, attention(1, 3), 4, Reporter(), compensated=False, sequential=False))


def of_candidates(evaluator):
    fitted = fit_candidates(evaluator, attention(1), attention(2, 4), "low_rank", 4, Reporter())
    return {f"{s}.{n}": t for s, m in fitted.items() for n, t in m.state_dict().items()}


def fused(evaluator):
    fusion = fuse(evaluator, attention(1, 4), 4, Reporter(), biased=True, compensated=True, recalibrated=True)
    units = {f"{block}.{name}": getattr(each, name) for block, each in fusion.units.items() for name in ("up", "down")}
    return fusion.weights | units


@pytest.mark.parametrize(
    ("how", "model_type"),
    [(how, "llama") for how in (plain, recalibrated, with_context, independent, of_candidates, fused)]
    + [(plain, "cohere"), (with_context, "gemma2")],
)
@pytest.mark.parametrize("half", [False, True])
def test_a_fit_from_disk_has_the_same_bits(how, model_type, half, pico, monkeypatch, cache):
    found = []
    for budget in (2**30, 0):
        monkeypatch.setattr(spill, "BUDGET_BYTES", budget)
        monkeypatch.setattr(compensation, "HELD_BYTES", budget)
        evaluator = Evaluator(pico(model_type), FAMILIES[model_type], tokens(30, 24), batch_size=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(how(evaluator))
    assert cache.exists()
    held, spilled = found
    assert held.keys() == spilled.keys()
    assert all(torch.equal(tensor, spilled[name]) for name, tensor in held.items())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_stays_behind(error, pico, monkeypatch, cache):
    monkeypatch.setattr(spill, "BUDGET_BYTES", 0)
    files = len(os.listdir("/proc/self/fd"))

    class Failing(Evaluator):
        def run_and_tap(self, sublayer, *arguments):
            if error and sublayer.block == 4:
                raise error
            return super().run_and_tap(sublayer, *arguments)

    try:
        recover(Failing(pico("llama"), FAMILIES["llama"], tokens(10, 24)), attention(1, 3), 4, Reporter())
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert list(cache.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_nothing_stays_behind_a_killed_process(cache):
    code = (
        "import os, torch; from pruning.forward.spill import Spilled; "
        "kept = Spilled(); kept.append(torch.ones(9)); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pruning.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    assert list(cache.iterdir()) == []


def test_arguments_that_batches_share_are_held_once(pico):
    rows = [*tokens(8, 24).split(2), tokens(2, 16)]
    _, arguments = enter(Evaluator(pico("gemma2"), FAMILIES["gemma2"], rows))
    assert all(arguments[number] is arguments[0] for number in range(4))
    assert arguments[4] is not arguments[0]
