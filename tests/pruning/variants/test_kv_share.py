"""Attention over a kept layer's cache: what it recovers exactly, masked = exported = cached, and who is refused."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.export.formats import PrunedModel, format_named
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import DenseModel
from pruning.models.sizes import shape_of
from pruning.plan import Plan, Sublayer
from pruning.recovery.emulation import fit_candidates, fit_plan, recover
from pruning.recovery.fitting import fit_plans
from pruning.recovery.healing import heal
from pruning.recovery.training import Settings
from pruning.variants import kv_share_fit as kv_sharing
from pruning.variants import variant
from pruning.variants.kv_share import KVShareEmulation
from pruning.variants.low_rank import LowRankEmulation
from tests.conftest import (
    KV_SHARE_PLAN,
    check_exported_equals_masked,
    pico_config,
    pico_model,
    run_prune_export,
    tokens,
)

SHARING = [name for name, family in FAMILIES.items() if family.shares_cache]
LATE = Sublayer(3, "attention")


def copied_attention(model_type):
    """A model whose block 3 has the attention of block 2 and, since nothing is added in between, the same input."""
    model = pico_model(model_type)
    family = FAMILIES[model_type]
    blocks = model.model.layers
    blocks[2].self_attn.q_proj.weight *= 8  # decided enough for contexts to differ
    for name in ("self_attn", "input_layernorm"):
        getattr(blocks[3], name).load_state_dict(getattr(blocks[2], name).state_dict())
    blocks[2].self_attn.o_proj.weight.zero_()
    if blocks[2].self_attn.o_proj.bias is not None:
        blocks[2].self_attn.o_proj.bias.zero_()
    blocks[2].mlp.down_proj.weight.zero_()
    return model, family


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "granite"])  # Qwen3's norm of queries is no linear map
def test_a_copy_of_its_source_on_the_same_stream_is_reproduced(model_type, monkeypatch):
    model, family = copied_attention(model_type)
    monkeypatch.setattr(kv_sharing, "RIDGE", 1e-7)
    monkeypatch.setattr(kv_sharing, "STEPS", 150)
    monkeypatch.setattr(kv_sharing, "RIDGES", (1e-8,))
    evaluator = Evaluator(model, family, tokens(36, 48))
    fitted = fit_plan(evaluator, {LATE: "kv_share"}, 2, Reporter())
    assert fitted[LATE].sources == (2,)
    judged = Evaluator(model, family, tokens(4, 48, seed=5))
    dense, without, shared = judged.values([{}, {LATE: None}, fitted], "logits").mean(1)
    attention, norm = model.model.layers[3].self_attn, model.model.layers[3].input_layernorm
    wanted = attention.q_proj.weight * norm.weight
    assert (fitted[LATE].query.weight - wanted).norm() < 1e-3 * wanted.norm()
    assert shared < 1e-4 * without  # squared logits
    assert dense == 0


@pytest.mark.parametrize("model_type", SHARING)
def test_masked_equals_exported_and_cached(model_type, pico_checkpoint):
    directory, _ = pico_checkpoint(f"{model_type} kv-share")
    dense, family = pico_model(model_type), FAMILIES[model_type]
    fitted = fit_plan(Evaluator(dense, family, tokens()), KV_SHARE_PLAN.removed, 4, Reporter())
    ids = tokens(4, 40, seed=7)
    evaluator = Evaluator(dense, family, ids, batch_size=2)
    masked = evaluator.values([{}, fitted, dict.fromkeys(fitted)])[1]  # beside others, so that streams run together
    model = AutoModelForCausalLM.from_pretrained(directory)
    check_exported_equals_masked(model, ids, masked, prompts=2)
    cache = model(ids, use_cache=True).past_key_values
    assert sum(layer.keys is not None and layer.keys.numel() > 0 for layer in cache.layers) == 2


def test_padding_on_the_left_changes_nothing(pico_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(pico_checkpoint("llama kv-share")[0])
    ids = tokens(1, 20, seed=3)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids], 1)
    mask = (torch.arange(26) >= 6).long()[None]
    with torch.inference_mode():
        alone = model(ids).logits
        among = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 6:]
    assert (alone - among).abs().max() < 1e-5


def test_save_pretrained_round_trips(pico_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_checkpoint("qwen3 kv-share")[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 20)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(ids - 1).logits, model(ids - 1).logits)


def test_it_fits_its_windows_better_than_its_own_input_alone():
    """Block 3 keeps a head's values but looks elsewhere than block 2; a per-token map cannot follow, queries can."""
    model, family = copied_attention("llama")
    attention = model.model.layers[3].self_attn
    torch.manual_seed(0)
    attention.q_proj.weight += 0.5 * attention.q_proj.weight.std() * torch.randn_like(attention.q_proj.weight)
    evaluator = Evaluator(model, family, tokens(40, 48))
    kinds = ("low_rank", "kv_share", "kv_share_low_rank")
    fitted = [fit_plan(evaluator, {LATE: kind}, 32, Reporter()) for kind in kinds]
    judged = Evaluator(model, family, tokens(4, 48, seed=5))
    own, full, low = judged.values(fitted, "logits").mean(1)
    assert full < 0.2 * own
    assert full < low < own


def test_sources_are_kept_attention_layers_of_the_same_window():
    config = {"layer_types": ["full_attention", "sliding_attention"] * 3, "use_sliding_window": True}
    model = pico_model("qwen2", sliding_window=16, **config)
    evaluator = Evaluator(model, FAMILIES["qwen2"], tokens(2, 24))
    gone = [Sublayer(b, "attention") for b in (0, 1, 4, 5)]
    types = evaluator.model.config.layer_types
    assert [variant("kv_share").sources(gone, s, types, 1) for s in gone] == [(), (), (2,), (3,)]
    assert variant("kv_share").sources(gone, Sublayer(4, "ffn"), types, 1) == ()


def test_healing_trains_its_queries():
    model, family = pico_model("llama"), FAMILIES["llama"]
    plan = Plan(6, {Sublayer(2, "attention"): "kv_share", Sublayer(4, "attention"): "kv_share_low_rank"}, rank=4)
    recovery = recover(Evaluator(model, family, tokens(16, 32)), plan.removed, 4, Reporter(), compensated=False)
    settings = Settings(
        trained="adapters", loss="kl", optimizer="adamw", learning_rate=1e-3, lora_rank=2, steps=8, minutes=None,
        batch_tokens=128, precision="no", seed=0,
    )  # fmt: skip
    rows, validation = tokens(32, 32, seed=2), tokens(4, 32, seed=3)
    healed, record = heal(model, family, plan, recovery, rows, validation, settings, Reporter(), state=None, scope="")
    assert record["end"]["kl"] < record["start"]["kl"]
    for sublayer, module in recovery.emulations.items():
        assert not torch.equal(healed.emulations[sublayer].query.weight, module.query.weight)


def test_without_a_source_it_is_a_low_rank_map():
    model = pico_model("llama")
    removed = {Sublayer(0, "attention"): "kv_share", Sublayer(2, "ffn"): "kv_share"}
    fitted = fit_plan(Evaluator(model, FAMILIES["llama"], tokens()), removed, 4, Reporter())
    assert all(isinstance(module, LowRankEmulation) for module in fitted.values())


def test_candidates_are_fitted_as_the_plan_would_be():
    model, family = pico_model("llama"), FAMILIES["llama"]
    evaluator = Evaluator(model, family, tokens())
    base, other = Sublayer(2, "attention"), Sublayer(4, "attention")
    found = fit_candidates(evaluator, [base], [other], "kv_share", 4, Reporter())
    planned = fit_plan(evaluator, dict.fromkeys([base, other], "kv_share"), 4, Reporter())
    together = fit_plans(evaluator, [{base: "kv_share"}, dict.fromkeys([base, other], "kv_share")], 4, Reporter())[1]
    for sublayer in (base, other):
        for fitted in (found[sublayer], together[sublayer]):
            assert isinstance(fitted, KVShareEmulation)
            assert fitted.sources == planned[sublayer].sources
            for mine, theirs in zip(fitted.parameters(), planned[sublayer].parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["kv_share", "kv_share_low_rank"])
def test_predicted_bytes_are_those_of_the_adapter(kind):
    model, family = pico_model("qwen3"), FAMILIES["qwen3"]
    fitted = fit_plan(Evaluator(model, family, tokens()), {LATE: kind}, 4, Reporter())
    dense = DenseModel("pico", Path(), model, None, family, "")
    assert variant(kind).weight_bytes(shape_of(dense, LATE, 4, 1)) == sum(
        p.numel() * p.element_size() for p in fitted[LATE].parameters()
    )


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - set(SHARING)))
def test_other_families_are_refused(model_type):
    with pytest.raises(RecipeError, match=f"kv-share does not support {model_type}"):
        variant("kv_share").check(FAMILIES[model_type], pico_config(model_type))


@pytest.mark.parametrize("name", ["nemotron-nas", "gguf", "llama"])
def test_other_formats_refuse_it(name, pico_checkpoint):
    directory, model = pico_checkpoint("llama kv-share")
    reason = format_named(name).refusal(PrunedModel.of(model, FAMILIES["llama"], directory))
    assert "adapter of attention.0" in reason


def test_fuse_refuses_it(monkeypatch, pico_directory, tmp_path, capsys):
    command = [pico_directory("llama"), "--emulation", "kv-share", "--fuse", "--output", tmp_path / "out"]
    assert run_prune_export(monkeypatch, *command) == 2
    assert "no FFN can hold the kv_share" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
