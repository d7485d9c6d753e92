"""Emulation as ordinary weights: exact where the algebra is exact, fitted elsewhere, refused where it cannot be."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.export.formats import FORMATS, PrunedModel
from pruning.families import FAMILIES, has_biases
from pruning.forward.evaluator import Evaluator
from pruning.models.surgery import apply_plan
from pruning.plan import Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import fit_plan
from pruning.recovery.fuse import check_fusable, fusable, fuse, places
from pruning.recovery.units import GATE, linear_units, widened
from pruning.regression import Affine

FUSABLE = [name for name, family in FAMILIES.items() if fusable(family)]


def windows(rows: int = 32, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def fused(model, model_type: str, plan: Plan):
    """The fusion, and the model (in place) with it."""
    family = FAMILIES[model_type]
    evaluator = Evaluator(model, family, windows(), batch_size=2)
    fusion = fuse(evaluator, plan.removed, plan.rank, Reporter(), biased=has_biases(model.config))
    apply_recovery(model, family, plan, fusion)
    return fusion, model


def states(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("replaced", [False, True])
def test_an_affine_map_is_units_of_an_ffn_exactly(replaced, pico):
    model = pico("llama")
    ffn, generator = model.model.layers[1].mlp, torch.Generator().manual_seed(0)
    down, up, bias, x = (torch.randn(s, generator=generator) for s in [(128, 4), (4, 128), (128,), (50, 128)])
    down /= 128**0.5
    act = ACT2FN["silu"]
    units = linear_units(Affine(down / act(torch.tensor(GATE)), up, bias), x)
    model.config.mlp_bias = True
    wide = widened(ffn, model.config, units, replaced)
    expected = x @ down @ up + bias + (0 if replaced else ffn(x))
    assert (wide(x) - expected).abs().max() < 1e-5
    assert wide.down_proj.in_features == (8 if replaced else 192 + 8)


@pytest.mark.parametrize("model_type", [name for name in FUSABLE if name in ("llama", "granite")])
def test_a_fused_bias_is_the_emulated_bias_exactly(model_type, pico):
    plan = Plan(6, {Sublayer(2, "attention"): "bias", Sublayer(2, "ffn"): "none"})
    dense = pico(model_type)
    emulations = fit_plan(Evaluator(dense, FAMILIES[model_type], windows(), batch_size=2), plan.removed, 0, Reporter())
    fusion, model = fused(pico(model_type), model_type, plan)
    apply_plan(dense, FAMILIES[model_type], plan, emulations)
    assert fusion.places == {Sublayer(2, "attention"): "previous"}
    assert len(model.model.layers) == 5
    assert (states(model, windows(seed=9)) - states(dense, windows(seed=9))).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", FUSABLE)
@pytest.mark.parametrize("ffn", ["kept", "none"])
def test_a_fused_model_computes_what_was_fitted(model_type, ffn, pico, tmp_path):
    removed = {Sublayer(2, "attention"): "low_rank"} | ({Sublayer(2, "ffn"): "none"} if ffn == "none" else {})
    plan, family, dense, ids = Plan(6, removed, 4), FAMILIES[model_type], pico(model_type), windows(seed=9)
    fusion, model = fused(pico(model_type), model_type, plan)

    evaluator, act = Evaluator(dense, family, ids), ACT2FN[dense.config.hidden_act]
    place = fusion.places[Sublayer(2, "attention")]
    ((host, units),) = fusion.units.items()
    assert host == (1 if place == "previous" else 2)
    assert place == "previous" or ffn == "kept"
    hidden, kwargs = evaluator.embed(ids)
    with torch.inference_mode():
        for index in range(6):
            for sublayer in (Sublayer(index, "attention"), Sublayer(index, "ffn")):
                before, read = hidden, getattr(dense.model.layers[index], family.ffn_norm)(hidden)
                if sublayer not in removed:
                    hidden = evaluator.run_sublayer(sublayer, hidden, kwargs[index])
                if sublayer == Sublayer(host, "ffn"):
                    own = hidden - before
                    hidden = hidden + family.scale(dense.config) * units.update(read, act)
                    hidden = hidden + own @ fusion.turns[host].float()
        expected = dense.model.norm(hidden)
    assert (states(model, ids) - expected).abs().max() < 1e-5

    FORMATS["shoal"].write(PrunedModel.of(model, family, tmp_path), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (states(loaded, ids) - states(model, ids)).abs().max() == 0
    assert not [name for name, _ in loaded.named_modules() if "emulation" in name]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fusing_brings_the_model_nearer_to_the_dense_one(model_type, pico):
    removed = {
        Sublayer(2, "attention"): "low_rank",
        Sublayer(3, "attention"): "low_rank",
        Sublayer(4, "ffn"): "low_rank",
    }
    plan, ids, family = Plan(6, removed, 32), windows(), FAMILIES[model_type]
    dense, bare = states(pico(model_type), ids), pico(model_type)
    apply_plan(bare, family, Plan(6, dict.fromkeys(removed, "none")), {})
    fusion, model = fused(pico(model_type), model_type, plan)
    assert fusion.places[Sublayer(4, "ffn")] == "own"
    assert model.model.layers[4].mlp.down_proj.in_features == 32
    without, remaining = ((states(m, ids) - dense).pow(2).mean() for m in (bare, model))
    assert remaining < 0.9 * without
    assert set(fusion.errors) == {Sublayer(2, "attention"), Sublayer(3, "attention")}


def test_a_removed_run_of_blocks_becomes_a_map_on_the_output_of_the_ffn_before_it(pico):
    def model_with_a_large_ffn():
        model = pico("llama")
        model.model.layers[1].mlp.down_proj.weight.data *= 30  # most of the stream, so the next update depends on it
        return model

    removed = {Sublayer(block, kind): "none" for block in (2, 3) for kind in ("attention", "ffn")}
    plan, ids = Plan(6, removed), windows()
    dense, bare = states(model_with_a_large_ffn(), ids), model_with_a_large_ffn()
    apply_plan(bare, FAMILIES["llama"], plan, {})
    fusion, model = fused(model_with_a_large_ffn(), "llama", plan)
    assert list(fusion.weights) == ["model.layers.1.mlp.down_proj.weight"]
    assert not fusion.units
    assert model.config.mlp_bias is False
    without, remaining = ((states(m, ids) - dense).pow(2).mean() for m in (bare, model))
    assert remaining < 0.9 * without


def test_what_cannot_be_fused_is_refused_by_name():
    attention = {Sublayer(2, "attention"): "low_rank"}
    with pytest.raises(RecipeError, match="Gemma2 normalises what an FFN adds"):
        check_fusable(FAMILIES["gemma2"], attention)
    with pytest.raises(RecipeError, match=r"attention\.1 has no FFN"):
        check_fusable(
            FAMILIES["llama"],
            {Sublayer(1, "attention"): "low_rank", Sublayer(0, "ffn"): "none", Sublayer(1, "ffn"): "none"},
        )  # fmt: skip
    check_fusable(FAMILIES["llama"], attention)


def test_the_ffn_before_is_looked_for_across_removed_blocks():
    gone = {Sublayer(2, "attention"): "none", Sublayer(2, "ffn"): "none", Sublayer(3, "attention"): "low_rank"}
    assert places(Sublayer(3, "attention"), gone) == ["previous", "same"]
    del gone[Sublayer(2, "attention")]  # now an attention layer runs in between
    assert places(Sublayer(3, "attention"), gone) == ["same"]
