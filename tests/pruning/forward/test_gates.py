"""Gate gradients: finite differences, one block's graph at a time, nothing left behind."""

import gc
import weakref

import pytest
import torch

from pruning.families import FAMILIES
from pruning.forward import gates
from pruning.forward.evaluator import Evaluator
from tests.conftest import tokens


def test_gate_gradients_leave_no_graph_behind(pico):
    model = pico("llama").requires_grad_(True)  # as a model comes from its files
    evaluator = Evaluator(model, FAMILIES["llama"], tokens(2), batch_size=2)
    seen = []
    attention = evaluator.blocks[3].self_attn
    attention.register_forward_hook(lambda _, arguments, output: seen.append(weakref.ref(output[0])))
    gates.sublayer_gradients(evaluator, torch.ones(6, 2), 0)
    gc.collect()
    assert seen
    assert all(reference() is None for reference in seen)


def test_gate_gradients_equal_finite_differences(pico):
    evaluator = Evaluator(pico("llama").double(), FAMILIES["llama"], tokens(2), batch_size=2)
    gradient = gates.sublayer_gradients(evaluator, torch.ones(6, 2), 0).sum(0)

    def loss(block, column, step):
        hidden, kwargs = evaluator.embed(evaluator.batches[0])
        with torch.no_grad():
            for index in range(6):
                row = torch.ones(2, 2, dtype=torch.float64)
                if index == block:
                    row[:, column] += step
                hidden = gates.with_sublayer_gates(evaluator, index, hidden, kwargs[index], row, {})
            return float(evaluator.head_loss(hidden, evaluator.batches[0]).sum())

    for block, column in ((0, 0), (3, 1), (5, 0)):
        difference = (loss(block, column, 1e-2) - loss(block, column, -1e-2)) / 2e-2
        assert float(gradient[block, column]) == pytest.approx(difference, abs=2e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_block_by_block_is_the_whole_graph_and_holds_one_block(pico, model_type, monkeypatch):
    evaluator = Evaluator(pico(model_type).requires_grad_(True), FAMILIES[model_type], tokens(2), batch_size=2)
    alive, most = weakref.WeakSet(), [0]

    def look(module, arguments, output):
        alive.add(output)
        most[0] = max(most[0], len(alive))

    for block in evaluator.blocks:
        block.mlp.down_proj.register_forward_hook(look)
    found = gates.sublayer_gradients(evaluator, torch.full((6, 2), 0.7), 0)
    assert most[0] <= 2
    monkeypatch.setattr(gates, "_block_by_block", gates._at_once)
    whole = gates.sublayer_gradients(evaluator, torch.full((6, 2), 0.7), 0)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
