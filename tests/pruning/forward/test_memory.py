"""What a fit holds grows with its calibration tokens by the two residual streams, and past a budget by nothing."""

import gc

import pytest
import torch

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward import spill
from pruning.forward.evaluator import Evaluator
from pruning.plan import Sublayer
from pruning.recovery import compensation
from pruning.recovery.emulation import fit_candidates, recover
from pruning.recovery.fuse import fuse
from tests.conftest import tokens

LENGTH = 32
BATCH = 4
ROWS = 24
STREAM = 128 * 4  # bytes of a token in one residual stream


class Watched(Evaluator):
    """Notes the most bytes that tensors hold while the last but one batch goes through a sublayer."""

    calls, most = 0, 0

    def run_and_tap(self, *arguments):
        self._look()
        return super().run_and_tap(*arguments)

    def run_sublayer(self, *arguments):
        self._look()
        return super().run_sublayer(*arguments)

    def _look(self):
        self.calls += 1
        if self.calls % len(self.batches) == len(self.batches) - 1:
            tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
            storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
            self.most = max(self.most, sum(storages.values()))


def compensated(evaluator, kind):
    removed = {Sublayer(block, "attention"): kind for block in (1, 3, 4)}
    return recover(evaluator, removed, 4, Reporter(), sources=1)


def independent(evaluator, kind):
    removed = {Sublayer(1, "attention"): kind, Sublayer(3, "ffn"): kind}
    return recover(evaluator, removed, 4, Reporter(), compensated=False, sequential=False)


def candidates(evaluator, kind):
    return fit_candidates(evaluator, [Sublayer(1, "attention")], [Sublayer(4, "attention")], kind, 4, Reporter())


def fused(evaluator, kind):
    removed = {Sublayer(block, "attention"): kind for block in (2, 4)}
    return fuse(evaluator, removed, 4, Reporter(), biased=True, compensated=True)


def growth(model, how, kind):
    """Streams' worth of bytes that a fit holds for every further token."""
    most = []
    for rows in (ROWS, 4 * ROWS):
        evaluator = Watched(model, FAMILIES[model.config.model_type], tokens(rows, LENGTH), batch_size=BATCH)
        gc.freeze()  # what is there already is not looked at
        try:
            how(evaluator, kind)
        finally:
            gc.unfreeze()
        most.append(evaluator.most)
    return (most[1] - most[0]) / (3 * ROWS * LENGTH * STREAM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "streams"),
    [(compensated, "low_rank", 2), (compensated, "context", 3), (independent, "low_rank", 3),
     (candidates, "low_rank", 2), (fused, "low_rank", 7)],
)  # fmt: skip
def test_each_token_costs_no_more_than_its_streams(how, kind, streams, pico, monkeypatch):
    monkeypatch.setattr(compensation, "HELD_BYTES", 0)
    assert growth(pico("llama"), how, kind) < streams + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("how", [compensated, independent, candidates, fused])
def test_past_the_budget_no_token_costs_memory(how, pico, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(spill, "BUDGET_BYTES", 0)
    monkeypatch.setattr(compensation, "HELD_BYTES", 0)
    assert growth(pico("llama"), how, "low_rank") < 0.5
