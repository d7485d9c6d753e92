"""Predicted bytes are those of the model as exported."""

from pathlib import Path

import pytest

from pruning.console import Reporter
from pruning.families import FAMILIES, has_biases
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import DenseModel
from pruning.models.sizes import predicted_bytes, sublayer_bytes, weight_bytes
from pruning.models.surgery import apply_plan
from pruning.plan import Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.fuse import fuse
from tests.conftest import BLOCKS, pico_tokenizer, tokens


def dense_model(model, model_type: str) -> DenseModel:
    return DenseModel("pico", Path(), model, pico_tokenizer(), FAMILIES[model_type], "")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("block", [1, 5])  # of qwen3_moe, 1 has experts and 5 has none
def test_a_removed_ffn_saves_its_own_bytes(model_type, block, pico):
    model = pico(model_type)
    plan = Plan(BLOCKS, {Sublayer(block, "ffn"): "none", Sublayer(2, "attention"): "none"}, rank=4)
    predicted = predicted_bytes(dense_model(model, model_type), plan, 64)
    assert predicted["weights_dense"] == weight_bytes(model)
    apply_plan(model, FAMILIES[model_type], plan, {})
    assert predicted["weights"] == weight_bytes(model)


def test_experts_weigh_more_than_the_dense_ffn_between_them(pico):
    each = sublayer_bytes(dense_model(pico("qwen3_moe"), "qwen3_moe"))
    assert each[Sublayer(1, "ffn")] > each[Sublayer(5, "ffn")] > 0


@pytest.mark.parametrize("emulation", ["bias", "low_rank", "linear"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # with biases, without
def test_a_fused_model_weighs_at_most_what_is_predicted(model_type, emulation, pico):
    model, family = pico(model_type), FAMILIES[model_type]
    plan = Plan(BLOCKS, {Sublayer(2, "attention"): emulation, Sublayer(4, "ffn"): emulation}, rank=8)
    predicted = predicted_bytes(dense_model(model, model_type), plan, 64, fused=True)
    evaluator = Evaluator(model, family, tokens())
    fusion = fuse(evaluator, plan.removed, plan.rank, Reporter(), biased=has_biases(model.config))
    apply_recovery(model, family, plan, fusion)
    assert 0.99 * predicted["weights"] < weight_bytes(model) <= predicted["weights"]
