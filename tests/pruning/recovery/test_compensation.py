import math

import pytest
import torch
from torch import nn

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.surgery import apply_plan
from pruning.plan import KINDS, Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.compensation import apply_weights
from pruning.recovery.emulation import recover
from tests.conftest import divergence, plain_logits

PLAN = Plan(6, {Sublayer(1, "attention"): "low_rank", Sublayer(3, "ffn"): "none"}, rank=4)


def ids(rows: int = 96, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(5))


def evaluator_of(model, model_type, tokens):
    return Evaluator(model, FAMILIES[model_type], tokens, batch_size=4)


def final_states(model, tokens):
    """Final normed hidden states [n, T, D], and logits that depend on them."""
    with torch.inference_mode():
        return model.model(input_ids=tokens).last_hidden_state


def apart(model, dense, tokens):
    """Mean KL(dense || model), nats/token."""
    return float(divergence(plain_logits(dense, tokens), plain_logits(model, tokens)))


def recovered(pico, model_type, compensated, tokens):
    model = pico(model_type)
    recovery = recover(
        evaluator_of(model, model_type, tokens), PLAN.removed, PLAN.rank, Reporter(), compensated=compensated
    )
    apply_recovery(model, FAMILIES[model_type], PLAN, recovery)
    return model, recovery


@pytest.mark.parametrize("model_type", ["llama", "granite", "phi3", "stablelm"])
def test_compensation_brings_the_pruned_model_nearer_to_the_dense_one(pico, model_type):
    tokens, unseen = ids(), ids(104)[96:]
    dense = pico(model_type)
    without, _ = recovered(pico, model_type, False, tokens)
    with_it, recovery = recovered(pico, model_type, True, tokens)
    assert recovery.weights
    assert apart(with_it, dense, tokens) < 0.95 * apart(without, dense, tokens)
    assert apart(with_it, dense, unseen) < apart(without, dense, unseen)


def test_the_loss_on_text_the_model_wrote_falls(pico):
    model = pico("llama")
    torch.manual_seed(0)
    tokens = model.generate(ids(96, 1), max_new_tokens=31, min_new_tokens=31, do_sample=True, top_k=0)
    losses = []
    for compensated in (False, True):
        pruned, _ = recovered(pico, "llama", compensated, tokens)
        with torch.inference_mode():
            losses.append(float(pruned(input_ids=tokens, labels=tokens).loss))
    assert losses[1] < losses[0]


def test_the_dense_model_is_left_bit_identical_and_without_hooks(pico):
    model = pico("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recovery = recover(evaluator_of(model, "llama", ids()), PLAN.removed, PLAN.rank, Reporter())
    assert recovery.weights
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert any(not torch.equal(weight, before[name]) for name, weight in recovery.weights.items())


def test_fitting_twice_gives_the_same_bits(pico):
    first, second = (
        recover(evaluator_of(pico("llama"), "llama", ids()), PLAN.removed, PLAN.rank, Reporter()) for _ in range(2)
    )
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())
    a, b = (r.emulations[Sublayer(1, "attention")].state_dict() for r in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fits_of_bfloat16_passes_keep_float32_weights_and_nearly_the_same_model(pico):
    tokens, unseen = ids(), ids(104)[96:]
    dense = pico("llama")
    exact, _ = recovered(pico, "llama", True, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        recovery = recover(evaluator_of(pico("llama"), "llama", tokens), PLAN.removed, PLAN.rank, Reporter())
    fast = pico("llama")
    apply_recovery(fast, FAMILIES["llama"], PLAN, recovery)
    assert recovery.weights
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float32}
    assert apart(fast, dense, unseen) < 1.05 * apart(exact, dense, unseen)


def test_only_kept_sublayers_after_the_first_removal_change(pico):
    recovery = recover(evaluator_of(pico("llama"), "llama", ids()), PLAN.removed, PLAN.rank, Reporter())
    allowed = {f"model.layers.{block}.self_attn.o_proj.weight" for block in (2, 3, 4, 5)}
    allowed |= {f"model.layers.{block}.mlp.down_proj.weight" for block in (1, 2, 4, 5)}
    assert recovery.weights.keys() <= allowed


def test_families_with_a_norm_after_the_update_are_left_alone(pico):
    recovery = recover(evaluator_of(pico("gemma2"), "gemma2", ids()), PLAN.removed, PLAN.rank, Reporter())
    assert recovery.weights == {}
    assert recovery.emulations.keys() == PLAN.removed.keys()


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_the_ffn_before_a_run_of_removed_blocks_takes_over_from_it(pico, model_type):
    tokens, unseen = ids(), ids(104)[96:]
    plan = Plan(6, {Sublayer(block, kind): "none" for block in (2, 3) for kind in KINDS})
    models = []
    for compensated in (False, True):
        model = pico(model_type)
        evaluator = evaluator_of(model, model_type, tokens)
        recovery = recover(evaluator, plan.removed, 4, Reporter(), compensated=compensated)
        if compensated:
            assert "model.layers.1.mlp.down_proj.weight" in recovery.weights
            patch = {"model.layers.1.mlp.down_proj.weight": recovery.weights["model.layers.1.mlp.down_proj.weight"]}
            apply_weights(model, patch)
        apply_plan(model, FAMILIES[model_type], plan, recovery.emulations)
        models.append(model)
    without, patched = (apart(model, pico(model_type), unseen) for model in models)
    assert patched < 0.95 * without


def test_too_few_windows_to_hold_any_out_change_nothing(pico):
    recovery = recover(evaluator_of(pico("llama"), "llama", ids(4)), PLAN.removed, PLAN.rank, Reporter())
    assert recovery.weights == {}


class LinearSublayer(nn.Module):
    """An attention module that is a linear map of its normed input."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden_states, **kwargs):
        return hidden_states @ self.weight.T, None


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_a_layer_that_is_linear_is_recovered(pico, model_type):
    model, tokens = pico(model_type), ids()
    size = model.config.hidden_size
    weight = torch.randn(size, 6, generator=torch.Generator().manual_seed(2)) / math.sqrt(size)
    weight = weight @ torch.randn(6, size, generator=torch.Generator().manual_seed(3)) / math.sqrt(6)
    model.model.layers[2].self_attn = LinearSublayer(weight)
    # The adapter's and the model's norm differ in their epsilon; large streams make that negligible.
    model.model.embed_tokens.weight.data *= 10
    expected = final_states(model, tokens)
    plan = Plan(6, {Sublayer(2, "attention"): "low_rank"}, rank=6)
    family = FAMILIES[model_type]
    cut = pico(model_type)
    cut.load_state_dict({k: v for k, v in model.state_dict().items() if k in cut.state_dict()}, strict=False)
    recovery = recover(evaluator_of(model, model_type, tokens), plan.removed, 6, Reporter(), compensated=False)
    apply_plan(cut, family, plan, recovery.emulations)
    error = (final_states(cut, tokens) - expected).norm() / expected.norm()
    zero = pico(model_type)
    zero.load_state_dict({k: v for k, v in model.state_dict().items() if k in zero.state_dict()}, strict=False)
    apply_plan(zero, family, plan, {})
    removed = (final_states(zero, tokens) - expected).norm() / expected.norm()
    assert error < 2e-3 < 0.05 < removed
