"""Emulations beyond the per-token map: masked = exported = generated with a cache, and what each recovers exactly."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.modeling import fed
from pruning.plan import Plan, Sublayer
from pruning.recovery.emulation import fit, fit_candidates, fit_plan, recover
from pruning.variants.base import Job
from pruning.variants.context import ContextEmulation
from pruning.variants.low_rank import LowRankEmulation, self_attention
from pruning.variants.taps import Tap
from tests.conftest import check_exported_equals_masked, export_pico, losses, pico_model, tokens

CONTEXT_PLAN = Plan(
    6,
    {
        Sublayer(0, "attention"): "context",  # nothing to read before it
        Sublayer(2, "attention"): "none",
        Sublayer(2, "ffn"): "none",
        Sublayer(3, "attention"): "context",
        Sublayer(3, "ffn"): "low_rank",
        Sublayer(5, "attention"): "context",
    },
    rank=4,
    sources=2,
)
ONLY_A_NORM_BEFORE = [
    name for name, family in FAMILIES.items() if family.norms("attention")[0] and not family.norms("attention")[1]
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Factory of (checkpoint directory, fitted emulations in the dense numbering) for `CONTEXT_PLAN`."""
    made = {}

    def make(model_type):
        if model_type not in made:
            model = pico_model(model_type)
            fitted = fit_plan(Evaluator(model, FAMILIES[model_type], tokens()), CONTEXT_PLAN.removed, 4, Reporter(), 2)
            directory = export_pico(model, model_type, CONTEXT_PLAN, tmp_path_factory.mktemp(model_type))
            made[model_type] = directory, fitted
        return made[model_type]

    return make


@pytest.mark.parametrize("model_type", FAMILIES)
def test_masked_context_equals_exported_and_cached(model_type, exported):
    directory, fitted = exported(model_type)
    ids = tokens(4, 40, seed=7)
    masked = Evaluator(pico_model(model_type), FAMILIES[model_type], ids, batch_size=2).loss(fitted)
    model = AutoModelForCausalLM.from_pretrained(directory)
    check_exported_equals_masked(model, ids, masked, prompts=1)


def test_sources_are_numbered_as_the_blocks_that_are_left(exported):
    directory, fitted = exported("llama")
    assert isinstance(fitted[Sublayer(0, "attention")], LowRankEmulation)
    assert fitted[Sublayer(3, "attention")].sources == (1,)
    assert fitted[Sublayer(5, "attention")].sources == (4, 1)
    configs = AutoModelForCausalLM.from_pretrained(directory).config.block_configs
    assert [c["attention"]["emulation"] for c in configs] == [
        {"kind": "low_rank", "rank": 4}, None, {"kind": "context", "rank": 4, "sources": [1]}, None,
        {"kind": "context", "rank": 4, "sources": [3, 1]},
    ]  # fmt: skip


def test_a_copied_model_reads_its_own_sources(exported):
    model = AutoModelForCausalLM.from_pretrained(exported("llama")[0])
    ids = tokens(2, 20, seed=7)
    with torch.inference_mode():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        model(tokens(2, 20, seed=8))
        assert torch.equal(twin(ids).logits, expected)


def test_plans_in_lock_step_do_not_mix_their_contexts(exported):
    directory, fitted = exported("llama")
    ids = tokens(4, 24, seed=7)
    plans = [
        fitted,
        {},
        {**fitted, Sublayer(1, "ffn"): None},
        {Sublayer(5, "attention"): fitted[Sublayer(5, "attention")], Sublayer(0, "ffn"): None},
    ]
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], ids, batch_size=2)
    table = evaluator.values(plans)
    for plan, row in zip(plans, table, strict=True):
        torch.testing.assert_close(row, evaluator.values([plan])[0], atol=1e-5, rtol=0)
    # The same of a model that was cut already: its own emulations read the stream they are in.
    cut = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        before = cut(ids).logits
    more = [{}, {Sublayer(0, "ffn"): None}, {Sublayer(1, "attention"): None}]
    evaluator = Evaluator(cut, FAMILIES["llama"], ids, batch_size=2)
    torch.testing.assert_close(
        evaluator.values(more), torch.stack([evaluator.values([plan])[0] for plan in more]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(evaluator.loss({}), losses(before, ids), atol=1e-5, rtol=0)
    with torch.inference_mode():
        assert torch.equal(cut(ids).logits, before)


def test_a_layer_that_repeats_another_is_recovered_by_context_and_not_by_a_map_of_its_input():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens())
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    weight = draw(128, 8) @ draw(8, 128) / 32
    streams, heard = [draw(4, 32, 128) for _ in range(16)], [draw(4, 32, 128) for _ in range(16)]
    targets = [x + c @ weight for x, c in zip(streams, heard, strict=True)]
    taps = [{1: Tap(c)} for c in heard]
    errors = {}
    for kind, sources in (("low_rank", ()), ("context", (1,))):
        job = Job(evaluator, Sublayer(3, "attention"), streams, targets, 8, taps, sources=sources)
        module = fit(kind, job)
        with fed(module, taps[0]):
            errors[kind] = float((streams[0] + module(streams[0]) - targets[0]).norm() / (heard[0] @ weight).norm())
    assert errors["context"] < 1e-2  # what the least penalty leaves
    assert errors["low_rank"] > 0.8


@pytest.mark.parametrize("model_type", ONLY_A_NORM_BEFORE)
def test_self_only_is_attention_where_there_is_one_token(model_type):
    evaluator = Evaluator(pico_model(model_type), FAMILIES[model_type], tokens(32, 1))
    sublayer = Sublayer(2, "attention")
    module = recover(
        evaluator, {sublayer: "self_only"}, 4, Reporter(), compensated=False
    ).emulations[sublayer]  # fmt: skip
    assert module.down.out_features <= 64
    hidden, kwargs = evaluator.embed(evaluator.batches[0])
    hidden = 10 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    if model_type == "stablelm":  # a LayerNorm divides by the standard deviation: the same where the mean is 0
        hidden = hidden - hidden.mean(-1, keepdim=True)
    exact = evaluator.run_sublayer(sublayer, hidden, kwargs[2])
    emulated = evaluator.run_sublayer(sublayer, hidden, kwargs[2], module)
    assert (exact - hidden).abs().max() > 1e-2
    # The adapter's norm has the epsilon 1e-6, the families' 1e-5 or 1e-6: nothing at this size.
    assert (exact - emulated).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2", "cohere"])
def test_self_only_refuses_a_norm_after_attention_and_one_that_is_shared(model_type):
    evaluator = Evaluator(pico_model(model_type), FAMILIES[model_type], tokens())
    with pytest.raises(RecipeError, match="self-only"):
        self_attention(evaluator, Sublayer(1, "attention"))


def test_linear_is_no_worse_than_a_low_rank_and_is_stored_as_one_of_full_rank():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(64, 32))
    gone = {Sublayer(2, "attention"): "linear"}
    module = fit_plan(evaluator, gone, 4, Reporter())[Sublayer(2, "attention")]
    assert module.down.out_features == 128


def test_candidates_with_context_are_fitted_as_the_plan_would_be():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(32, 32))
    base, candidate = [Sublayer(2, "attention")], Sublayer(4, "attention")
    found = fit_candidates(evaluator, base, [candidate], "context", 4, Reporter())
    whole = fit_plan(evaluator, dict.fromkeys([*base, candidate], "context"), 4, Reporter())
    assert isinstance(found[candidate], ContextEmulation)
    assert found[candidate].sources == whole[candidate].sources == (3,)
    for name, tensor in whole[candidate].state_dict().items():
        torch.testing.assert_close(found[candidate].state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
