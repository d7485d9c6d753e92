"""Blocks from disk give the same scores."""

import pytest
import torch

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.importance import Sampling, metric
from pruning.model import find_model, load_model
from pruning.plan import KINDS, Unit
from pruning.streaming import open_streamed
from pruning.subnetwork import Evaluator

UNITS = [Unit(block, kind) for block in range(6) for kind in KINDS]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_streamed_scores_equal_those_of_the_whole_model(pico_directory, model_type):
    source = find_model(str(pico_directory(model_type)), Reporter())
    whole = load_model(source, "float32", "cpu")
    streamed, residency = open_streamed(source, "float32", "cpu")
    ids = torch.randint(3, 320, (4, 20), generator=torch.Generator().manual_seed(1))
    for name in ("cosine", "leave-one-out", "kl", "logit-shapley"):
        function = metric(name).load()
        found = [
            function(
                Evaluator(dense.model, dense.family, ids, 2, residency=where), UNITS, Sampling(samples=1), Reporter()
            )
            for dense, where in ((whole, None), (streamed, residency))
        ]
        for unit in UNITS:
            assert found[1].values[unit] == pytest.approx(found[0].values[unit], abs=1e-5, rel=1e-5)
    assert all(parameter.device.type == "meta" for parameter in streamed.model.parameters())


def test_one_block_is_held_at_a_time(pico_directory):
    source = find_model(str(pico_directory("llama")), Reporter())
    streamed, residency = open_streamed(source, "float32", "cpu")
    held = []
    evaluator = Evaluator(streamed.model, streamed.family, torch.ones(1, 8, dtype=torch.int64), residency=residency)

    def visit(number, sublayer, before, after):
        here = {n.split(".")[2] for n, p in streamed.model.named_parameters() if p.device.type != "meta"}
        held.append(here == {str(sublayer.block)})

    evaluator.walk(visit)
    assert len(held) == 12
    assert all(held)


def test_blocks_are_read_into_the_memory_of_those_before(pico_directory):
    source = find_model(str(pico_directory("llama")), Reporter())
    streamed, residency = open_streamed(source, "float32", "cpu")
    seen = []
    for index in (0, 1, 5):
        with residency.block(index):
            seen.append({parameter.data_ptr() for parameter in streamed.model.model.layers[index].parameters()})
    assert seen[0] == seen[1] == seen[2]
