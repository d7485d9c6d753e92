"""The same results on the device of `SHOAL_DEVICE` (the CPU where it is not set) as on the CPU: `make test-device`."""

import os

import pytest
import torch

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.forward.streaming import open_streamed
from pruning.importance import Sampling, metric
from pruning.models.finding import find_model
from pruning.models.loading import load_model
from pruning.plan import Sublayer, Unit
from pruning.recovery.emulation import fit_plan
from pruning.regression import NormalEquations
from pruning.search import heads
from pruning.search.selection import Judge
from pruning.variants.window_fit import limits
from tests.conftest import tokens

DEVICE = os.environ.get("SHOAL_DEVICE", "cpu")
CLOSE = {"abs": 2e-4, "rel": 2e-3}
ATTENTION = [Sublayer(block, "attention") for block in range(6)]


@pytest.fixture(scope="module", params=["whole", "streamed"])
def both(request, pico_directory):
    """An evaluator on the CPU, and one on the device."""
    source = find_model(str(pico_directory("llama")), Reporter())
    found = []
    for device in ("cpu", DEVICE):
        if request.param == "streamed" and device == DEVICE:
            dense, _ = open_streamed(source, "float32", device)
        else:
            dense = load_model(source, "float32", device)
        found.append(Evaluator(dense.model, dense.family, tokens(4, 64), 1, residency=dense.residency))
    return found


def test_losses(both):
    here, there = (each.values([{}, {ATTENTION[2]: None}], "loss") for each in both)
    torch.testing.assert_close(there, here, atol=CLOSE["abs"], rtol=CLOSE["rel"])


def test_metrics(both):
    units = [Unit(block, kind) for block in range(6) for kind in ("attention", "ffn")]
    for name in ("leave-one-out", "cosine", "taylor"):
        here, there = (metric(name).load()(each, units, Sampling(samples=1), Reporter()).values for each in both)
        assert list(there.values()) == pytest.approx(list(here.values()), **CLOSE)


def test_windows_and_scores_of_heads(both):
    scores, losses = [], []
    for evaluator in both:
        found = {each: limit.window for each, limit in limits(evaluator, ATTENTION, 16, Reporter()).items()}
        judge = Judge("text", evaluator, 1.0, lambda base, found=found: found, "windows", gains=False)
        scores.append(heads.score([judge], found, 1, Reporter())[1.0].by_judge["text"])
        losses.append(evaluator.loss(found))
    torch.testing.assert_close(scores[1], scores[0], atol=CLOSE["abs"], rtol=CLOSE["rel"])
    torch.testing.assert_close(losses[1], losses[0], atol=CLOSE["abs"], rtol=CLOSE["rel"])


def test_adapters(both):
    here, there = (each.loss(fit_plan(each, {ATTENTION[3]: "low_rank"}, 4, Reporter())) for each in both)
    torch.testing.assert_close(there, here, atol=CLOSE["abs"], rtol=CLOSE["rel"])


def test_moments_stay_on_the_device_until_they_are_read():
    x, y, weights = torch.randn(64, 6), torch.randn(64, 5), torch.rand(64)
    here, there = NormalEquations.zeros(6, 5), NormalEquations.zeros(6, 5)
    for _ in range(3):
        here.add(x, y, weights)
        there.add(x.to(DEVICE), y.to(DEVICE), weights.to(DEVICE))
    assert {each.device.type for each in there._sums} == {torch.device(DEVICE).type}
    torch.testing.assert_close(there.xx, here.xx, atol=CLOSE["abs"], rtol=CLOSE["rel"])
    assert (there.weight, there.yy) == pytest.approx((here.weight, here.yy), rel=CLOSE["rel"])
    assert there.xy.device.type == "cpu"
