"""Blocks with another block's weights: the best differences, stored once, masked = exported, healed, and refused."""

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.errors import CheckpointError
from pruning.export.formats import PrunedModel, format_named
from pruning.export.writing import state_dict
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.walk import enter
from pruning.models.checkpoint import verify
from pruning.models.loading import DenseModel
from pruning.models.sizes import predicted_bytes, weight_bytes
from pruning.models.surgery import apply_plan
from pruning.plan import KINDS, Plan, Sublayer
from pruning.recovery.emulation import fit_plan, recover
from pruning.recovery.healing import heal
from pruning.recovery.training import Settings
from pruning.resources import plan_resources
from pruning.variants.shared import SharedEmulation, SharedLinear, materialised
from pruning.variants.shared_fit import differences, low_rank
from server.engine.compat import EngineFacts
from server.inventory import take_inventory
from tests.conftest import BLOCKS, SHARED_PLAN, check_exported_equals_masked, pico_model, run_prune_export, tokens

SHARING = sorted(name for name, family in FAMILIES.items() if family.ffn_output)
FULL = 192  # the width of the widest map
SETTINGS = Settings(
    trained="adapters", loss="kl", optimizer="adamw", learning_rate=1e-3, lora_rank=2, steps=8, minutes=None,
    batch_tokens=128, precision="no", seed=0,
)  # fmt: skip


def shared_plan(*blocks: int, rank: int = 4) -> Plan:
    return Plan(BLOCKS, {Sublayer(b, kind): "shared" for b in blocks for kind in KINDS}, rank=rank)


def fitted(model, model_type: str, plan: Plan):
    return fit_plan(Evaluator(model, FAMILIES[model_type], tokens()), plan.removed, plan.rank, Reporter())


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_the_start_is_the_best_difference_of_its_rank(rank):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(24, 40, generator=generator)
    inputs = torch.randn(200, 40, generator=generator) * torch.linspace(0.1, 3, 40)
    found = low_rank(difference, inputs.T @ inputs, rank, 8)

    def error(product):
        return float(((difference - product) @ inputs.T).pow(2).sum())

    own = error(found.up @ found.down)
    assert own == pytest.approx(found.error, rel=1e-3, abs=1)
    best = torch.linalg.svdvals(difference @ inputs.T)[rank:].pow(2).sum()
    assert own <= 1.005 * float(best) + 1e-2
    for _ in range(20):
        basis = torch.linalg.qr(torch.randn(24, rank, generator=generator)).Q
        assert error(basis @ basis.T @ difference) >= own - 1e-2
    assert torch.linalg.matrix_rank(found.up @ found.down) <= rank


def test_without_weighing_it_is_the_truncated_svd_of_the_difference():
    difference = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    found = low_rank(difference, torch.eye(40), 3, 200)
    left, values, right = torch.linalg.svd(difference)
    torch.testing.assert_close(found.up @ found.down, left[:, :3] * values[:3] @ right[:3], atol=1e-3, rtol=0)


def test_a_block_borrows_from_the_one_it_resembles():
    model = pico_model("llama")
    for name, own in model.model.layers[4].named_parameters():
        own.data = model.model.layers[1].get_parameter(name) + 0.05 * own
    evaluator = Evaluator(model, FAMILIES["llama"], tokens())
    gone = shared_plan(4, 2).removed
    found = differences(evaluator, list(gone), gone, 4, Reporter(), enter)
    assert {found[Sublayer(4, kind)].source for kind in KINDS} == {1}
    assert all(found[Sublayer(2, kind)].source not in (2, 4) for kind in KINDS)


@pytest.mark.parametrize("model_type", SHARING)
def test_with_full_rank_the_model_is_the_dense_one(model_type):
    model, ids = pico_model(model_type), tokens(2, 20)
    with torch.inference_mode():
        dense = model(ids).logits
    plan = shared_plan(2, 4, rank=FULL)
    apply_plan(model, FAMILIES[model_type], plan, fitted(model, model_type, plan))
    with torch.inference_mode():
        assert (model(ids).logits - dense).abs().max() < 1e-5 * max(1.0, float(dense.abs().max()))


@pytest.mark.parametrize("model_type", SHARING)
def test_masked_equals_exported_and_cached(model_type, pico_checkpoint):
    directory, pruned = pico_checkpoint(f"{model_type} shared")
    dense, family, ids = pico_model(model_type), FAMILIES[model_type], tokens(4, 40, seed=7)
    emulations = fitted(dense, model_type, SHARED_PLAN)
    evaluator = Evaluator(dense, family, ids, batch_size=2)
    masked = evaluator.values([{}, emulations, dict.fromkeys(emulations)])[1]
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, pruned(ids).logits)
    check_exported_equals_masked(model, ids, masked, prompts=2)
    cache = model(ids, use_cache=True).past_key_values
    assert sum(layer.keys is not None and layer.keys.numel() > 0 for layer in cache.layers) == BLOCKS


def test_the_scale_does_not_hurt_and_gives_the_size_of_what_agrees():
    """Against none at all, on the tokens it was fitted on; random weights agree in nothing, so that it shrinks."""
    model, family = pico_model("llama"), FAMILIES["llama"]
    evaluator = Evaluator(model, family, tokens())
    emulations = fit_plan(evaluator, shared_plan(3).removed, 4, Reporter())
    unscaled = copy.deepcopy(emulations)
    for module in unscaled.values():
        for shared in module.children():
            if shared.scale is not None:
                assert float(shared.scale.abs().mean()) < 1
                torch.nn.init.ones_(shared.scale)
    scaled, without, plain = evaluator.values([emulations, dict.fromkeys(emulations), unscaled], "logits").mean(1)
    assert scaled < without
    assert scaled < plain


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "qwen3"])
def test_lent_weights_are_stored_once_and_predicted(model_type):
    model, family = pico_model(model_type), FAMILIES[model_type]
    dense = DenseModel("pico", Path(), model, None, family, "")
    predicted = predicted_bytes(dense, SHARED_PLAN, 64)
    apply_plan(model, family, SHARED_PLAN, fitted(model, model_type, SHARED_PLAN))
    assert predicted["weights"] == weight_bytes(model) < predicted["weights_dense"]
    assert predicted["kv_per_token"] == predicted["kv_per_token_dense"]
    tensors = state_dict(model)
    assert not [name for name in tensors if name.startswith("model.layers.2.mlp") and ".emulation." not in name]
    assert max(Counter(tensor.data_ptr() for tensor in tensors.values()).values()) == 1
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == weight_bytes(model)
    twice = model.to(torch.bfloat16)
    assert twice(tokens(1, 8)).logits.dtype == torch.bfloat16


def test_save_pretrained_and_copies_round_trip(pico_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_checkpoint("qwen2 shared")[0])
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 20)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(ids).logits
        assert torch.equal(expected, again(ids).logits)
        for weight in model.parameters():
            weight.zero_()
        assert torch.equal(expected, copied(ids).logits)  # it borrows from its own blocks


@pytest.mark.parametrize("model_type", SHARING)
def test_ordinary_weights_made_from_it_give_the_same(model_type, pico_checkpoint):
    directory, pruned = pico_checkpoint(f"{model_type} shared")
    stored = load_file(directory / "model.safetensors")
    backwards = dict(sorted(stored.items(), reverse=True))
    made = dict(materialised(backwards.items(), pruned_block_configs(pruned, model_type), FAMILIES[model_type]))
    assert not [name for name in made if ".emulation." in name]
    dense, ids = pico_model(model_type), tokens(2, 24)
    missing, unexpected = dense.load_state_dict(made, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.inference_mode():
        torch.testing.assert_close(dense(ids).logits, pruned(ids).logits, atol=2e-5, rtol=0)


def pruned_block_configs(model, model_type):
    return PrunedModel.of(model, FAMILIES[model_type], Path()).block_configs


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("model.layers.2.mlp.emulation.up_proj.down.weight", "lacks down.weight for model.layers.2.mlp.up_proj"),
        ("model.layers.2.mlp.emulation", "lacks the differences of model.layers.2.mlp"),
    ],
)
def test_a_checkpoint_that_lacks_a_difference_is_refused(lost, says, pico_checkpoint):
    directory, pruned = pico_checkpoint("llama shared")
    stored = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(lost)}
    with pytest.raises(CheckpointError, match=says):
        dict(materialised(kept.items(), pruned_block_configs(pruned, "llama"), FAMILIES["llama"]))


def test_quantised_weights_are_not_lent(pico_checkpoint):
    directory, pruned = pico_checkpoint("llama shared")
    stored = load_file(directory / "model.safetensors")
    for name in stored:
        if name.endswith("proj.weight"):
            stored[name] = stored[name].to(torch.int8)
    with pytest.raises(CheckpointError, match="is quantised"):
        dict(materialised(stored.items(), pruned_block_configs(pruned, "llama"), FAMILIES["llama"]))


def own_text(model):
    """Windows that a tiny model wrote itself, so that being close to it and predicting them well go together."""
    torch.manual_seed(0)
    prompt = torch.randint(3, 320, (40, 1))
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 47, "min_new_tokens": 47, "pad_token_id": 0}
    rows = model.generate(prompt, eos_token_id=None, **options)
    return rows[:32], rows[32:]


@pytest.mark.parametrize("trained", ["adapters", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "cohere"])
def test_healing_trains_differences_scales_and_norms(model_type, trained):
    model, family = pico_model(model_type), FAMILIES[model_type]
    recovery = recover(Evaluator(model, family, tokens()), SHARED_PLAN.removed, 4, Reporter(), compensated=False)
    rows, validation = own_text(model)
    settings = replace(SETTINGS, trained=trained, learning_rate=2e-3, steps=16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    healed, record = heal(model, family, SHARED_PLAN, recovery, rows, validation, settings, Reporter())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert record["improved"]
    assert record["end"]["kl"] < record["start"]["kl"]
    for sublayer, start in recovery.emulations.items():
        old = dict(start.named_parameters())
        for name, parameter in healed.emulations[sublayer].named_parameters():
            assert not torch.equal(parameter, old[name]), name
    norms = {name for name in healed.weights if "norm" in name}
    assert bool(norms) == (not family.parallel)
    assert all(int(name.split(".")[2]) in (2, 4) for name in norms)
    assert (healed.weights.keys() > norms) == (trained == "lora")


QUICK = ["--calibration-tokens", "512", "--score-tokens", "128", "--sequence-length", "64", "--rank", "4"]


def test_an_export_is_whole_smaller_and_counts_its_cache(monkeypatch, pico_directory, text, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "out"
    command = [pico_directory("qwen2"), "--output", output, "--calibration", text, "--blocks", 2, *QUICK]
    healing = ["--heal", "adapters", "--heal-steps", 4, "--heal-batch-tokens", 128]
    assert run_prune_export(monkeypatch, *command, "--emulation", "shared", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "(100.0% of dense)" in said  # the KV cache
    assert not output.exists()
    assert run_prune_export(monkeypatch, *command, "--emulation", "shared", "--recalibrate", *healing) == 0
    manifest = verify(output)
    assert f"weights {manifest.sizes['weights'] / 2**20:.1f} MiB" in said
    assert sorted(manifest.removed.values()) == ["shared"] * 4
    assert manifest.sizes["weights"] < manifest.sizes["weights_dense"]
    facts = EngineFacts(4096, BLOCKS, 2, 32, 2, 4, 4, 256)
    inventory = take_inventory(output, manifest, facts)
    assert inventory.kv_bytes_per_token == inventory.kv_bytes_per_token_dense == manifest.sizes["kv_per_token"]
    assert plan_resources(output, 1).resident_bytes == manifest.sizes["weights_dense"]
    model = AutoModelForCausalLM.from_pretrained(output)
    shared = [module for module in model.modules() if isinstance(module, SharedEmulation)]
    assert len(shared) == 4
    assert all(isinstance(each, SharedLinear) for module in shared for each in module.children())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attention", 2], "ask for --blocks N"),
        (["--blocks", 1, "--attention", 1], "ask for --blocks N"),
        ([], "ask for --blocks N"),
        (["--kv-budget", "60%"], "ask for --blocks N"),
        (["--blocks", 2, "--compensate"], "--compensate changes kept weights"),
        (["--blocks", 2, "--fuse"], "--fuse changes kept weights"),
        (["--blocks", 2, "--recovery-aware"], "--recovery-aware cannot try --emulation shared"),
        (["--blocks", 2, "--format", "llama"], "--format llama holds no shared blocks"),
        (["--blocks", 2, "--format", "gguf"], "--format gguf holds no shared blocks"),
        (["--blocks", 2, "--format", "nemotron-nas"], "--format nemotron-nas holds no shared blocks"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(
    monkeypatch, pico_directory, text, tmp_path, capsys, flags, says
):
    command = [pico_directory(), "--output", tmp_path / "out", "--calibration", text, "--emulation", "shared", *QUICK]
    assert run_prune_export(monkeypatch, *command, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_refused(monkeypatch, model_type, pico_directory, text, tmp_path, capsys):
    command = [pico_directory(model_type), "--output", tmp_path / "out", "--calibration", text, "--blocks", 2, *QUICK]
    assert run_prune_export(monkeypatch, *command, "--emulation", "shared") == 2
    assert "does not support the experts" in capsys.readouterr().err


def test_a_sweep_refuses_it(monkeypatch, pico_directory, text, tmp_path, capsys):
    command = ["sweep", pico_directory(), "--output", tmp_path / "out", "--calibration", text, "--emulations", "shared"]
    assert run_prune_export(monkeypatch, *command, *QUICK) == 2
    assert "shared replaces whole blocks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nemotron-nas", "gguf", "llama"])
def test_other_formats_refuse_a_checkpoint_that_has_it(name, pico_checkpoint):
    directory, model = pico_checkpoint("llama shared")
    reason = format_named(name).refusal(PrunedModel.of(model, FAMILIES["llama"], directory))
    assert "another block's weights in the place of attention.2" in reason
