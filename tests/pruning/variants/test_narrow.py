"""Narrower FFNs: the exact cost of a unit, the refit, widths by a budget, and a checkpoint that reads back."""

import json

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pruning.console import Reporter
from pruning.families import FAMILIES, output_projection
from pruning.forward.evaluator import Evaluator
from pruning.forward.sensitivity import sensitivities
from pruning.models.checkpoint import verify
from pruning.plan import Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import recover
from pruning.regression import HeldOutMoments, token_weights
from pruning.search.widths import widths
from pruning.variants.narrow import narrowed
from pruning.variants.narrow_fit import RIDGE, eliminate, narrowings
from tests.conftest import BLOCKS, check_exported_equals_masked, pico_model, tokens
from tests.conftest import run_prune_export as run

SIZE = 192
DENSE = [name for name, family in FAMILIES.items() if family.ffn_output]
QUICK = ["--calibration-tokens", "1024", "--score-tokens", "256", "--sequence-length", "32", "--emulation", "narrow"]


def rows(seed: int, count: int, size: int) -> torch.Tensor:
    """Correlated rows of what enters an output projection, [count, size] float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixed


def error(x: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, left: torch.Tensor) -> float:
    """Squared error of the outputs x W' where only some units stay, with the projection `left` [D, n]."""
    return float((x @ weight.T - x[:, units] @ left.T).square().sum())


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_costs_are_those_of_least_squares(seed, kept, chunk):
    x, weight = rows(seed, 60, 12), rows(seed + 1, 5, 12)
    gram = x.T @ x
    found = eliminate(gram, weight, chunk)
    assert sorted(found.order.tolist()) == list(range(12))
    if kept in found.errors:
        units = found.kept(kept)
        ridge = RIDGE * gram.diagonal().sqrt().diag() * RIDGE**-0.5  # as rows more
        wide = torch.cat([x, ridge])
        best = torch.linalg.lstsq(wide[:, units], wide @ weight.T).solution.T
        whole = float((wide @ weight.T).square().sum())
        assert found.errors[kept] == pytest.approx(error(wide, weight, units, best) / whole, rel=1e-6, abs=1e-9)


@given(st.integers(0, 999), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_unit_costs_add_up_where_the_gram_matrix_is_diagonal(seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    squares, weight = torch.rand(12, generator=generator) + 0.1, torch.randn(5, 12, generator=generator)
    found = eliminate(squares.double().diag(), weight, chunk)
    alone = (squares * weight.square().sum(0)).double()
    assert found.order.tolist() == alone.argsort().tolist()
    for left, lost in found.errors.items():
        assert lost == pytest.approx(float(alone[found.order[: 12 - left]].sum() / alone.sum()), rel=1e-6)


@given(st.integers(0, 999), st.integers(1, 11))
@settings(max_examples=25, deadline=None)
def test_the_refit_is_never_worse_than_none_on_calibration_rows(seed, kept):
    x, weight = rows(seed, 60, 12), rows(seed + 1, 5, 12)
    units = eliminate(x.T @ x, weight, 2).kept(kept)
    missing = x @ weight.T - x[:, units] @ weight[:, units].T
    moments = HeldOutMoments.zeros(kept, 5)
    moments.add_windows(0, x[:, units].view(10, 6, kept), missing.view(10, 6, 5), torch.ones(10, 6))
    change = moments.correction()
    mended = weight[:, units] + (0 if change is None else change.T)
    assert error(x, weight, units, mended) <= error(x, weight, units, weight[:, units]) * (1 + 1e-9)


@pytest.mark.parametrize("model_type", DENSE)
def test_no_unit_less_changes_nothing(model_type):
    model, family = pico_model(model_type), FAMILIES[model_type]
    evaluator = Evaluator(model, family, tokens())
    removed = {Sublayer(block, "ffn"): "narrow" for block in range(BLOCKS)}
    every = dict.fromkeys(removed, torch.arange(SIZE))
    found = recover(evaluator, removed, 0, Reporter(), compensated=False, prepared=every).emulations
    for sublayer, made in found.items():
        dense = dict(evaluator.blocks[sublayer.block].get_submodule(family.ffn).named_parameters())
        assert {name for name, _ in made.ffn.named_parameters()} == set(dense)
        assert all(torch.equal(parameter, dense[name]) for name, parameter in made.ffn.named_parameters())
    assert torch.equal(evaluator.loss(found), evaluator.loss({}))


@pytest.mark.parametrize("model_type", ["llama", "cohere", "gemma2", "olmo2"])
def test_the_fitted_output_is_nearer_to_the_dense_stream_than_without_a_refit(model_type):
    model, family = pico_model(model_type), FAMILIES[model_type]
    evaluator = Evaluator(model, family, tokens(40))
    output = output_projection(family, "ffn")
    sublayer = Sublayer(2, "ffn")
    units = narrowings(evaluator, [2], 0, Reporter())[sublayer].kept(96)
    found = recover(evaluator, {sublayer: "narrow"}, 0, Reporter(), compensated=False, prepared={sublayer: units})
    plain = narrowed(evaluator.blocks[2].get_submodule(family.ffn), output, model.config, units)

    def lost(emulation) -> float:
        total = 0.0
        for batch in evaluator.batches:
            hidden, arguments = evaluator.embed(batch)
            for block in range(2):
                hidden = evaluator.run_block(block, hidden, arguments[block], {})
            goal = evaluator.run_block(2, hidden, arguments[2], {})
            difference = evaluator.run_block(2, hidden, arguments[2], {"ffn": emulation}) - goal
            total += float(difference.square().sum(-1).flatten().double() @ token_weights(goal))
        return total

    assert lost(found.emulations[sublayer]) < 0.95 * lost(plain)


@given(st.integers(0, 999), st.floats(0.05, 0.9))
@settings(max_examples=50, deadline=None)
def test_widths_meet_the_budget_and_equal_layers_get_nearly_equal_widths(seed, share):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(4, generator=generator) + 0.5
    costs = {
        layer: {n: float(scale) * (1 - n / 64) ** 2 for n in range(8, 65, 8)} for layer, scale in enumerate(scales)
    }
    excess = int(share * 4 * 56 * 100)
    found = widths(costs, dict.fromkeys(costs, 100), excess)
    assert found is not None
    saved = sum(64 - n for n in found.values()) * 100
    assert excess <= saved < excess + 800
    left = [found.get(layer, 64) for layer in costs]
    assert all(left[a] <= left[b] for a in costs for b in costs if scales[a] < scales[b])
    assert widths(costs, dict.fromkeys(costs, 100), 4 * 56 * 100 + 1) is None


def test_a_layer_that_costs_nothing_goes_first():
    costs = {0: {16: 0.0, 8: 0.0}, 1: {16: 0.0, 8: 0.1}}
    assert widths(costs, {0: 1, 1: 1}, 8) == {0: 8}


def test_the_narrowest_widths_follow_the_hull():
    """A curve that is dear at first and nothing more after that is not taken by small steps."""
    costs = {0: {24: 0.0, 16: 1.0, 8: 1.0}, 1: {24: 0.0, 16: 0.6, 8: 1.4}}
    assert widths(costs, {0: 1, 1: 1}, 16) == {0: 8}


@pytest.mark.parametrize("model_type", ["llama", "cohere", "phi3", "gemma2"])
def test_a_checkpoint_computes_what_was_fitted(model_type, pico_directory, text, tmp_path, monkeypatch):
    dense, output = pico_directory(model_type), tmp_path / "narrow"
    assert run(monkeypatch, dense, "--output", output, "--calibration", text, "--weight-budget", "85%", *QUICK) == 0
    manifest, config = verify(output), json.loads((output / "config.json").read_text())
    units = {int(block): n for block, n in manifest.quality["ffn_units"].items()}
    assert all(n % 8 == 0 and n < SIZE for n in units.values())
    assert {b: each["ffn"].get("intermediate_size", SIZE) for b, each in enumerate(config["block_configs"])} == {
        block: units.get(block, SIZE) for block in range(BLOCKS)
    }
    assert manifest.sizes["weights"] <= 0.85 * manifest.sizes["weights_dense"]
    assert manifest.sizes["weights"] > 0.82 * manifest.sizes["weights_dense"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert manifest.sizes["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    ids = tokens(4)
    masked = Evaluator(model, FAMILIES[model_type], ids).loss({})
    check_exported_equals_masked(model, ids, masked, 2)
    card = (output / "README.md").read_text()
    block, n = next(iter(units.items()))
    assert f"{block}: {n}" in card
    assert f"{len(units)} narrowed" in card


@pytest.mark.parametrize("to", ["nemotron-nas", "gguf", "llama"])
def test_other_formats_hold_what_they_can(to, pico_directory, text, tmp_path, monkeypatch, capsys):
    wanted = ["--output", tmp_path / "out", "--calibration", text, "--weight-budget", "85%", "--format", to, *QUICK]
    code = run(monkeypatch, pico_directory("llama"), *wanted)
    if to == "llama":
        assert code == 2
        assert "holds whole blocks only" in capsys.readouterr().err
        return
    assert code == 0
    units = {int(block): n for block, n in verify(tmp_path / "out").quality["ffn_units"].items()}
    if to == "gguf":
        found = GGUFReader(tmp_path / "out/model.gguf").fields["deci.feed_forward_length"].contents()
    else:
        blocks = json.loads((tmp_path / "out/config.json").read_text())["block_configs"]
        found = [block["ffn"]["intermediate_size"] for block in blocks]
    assert found == [units.get(block, SIZE) for block in range(BLOCKS)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ffn", "3"], "error: --emulation narrow: --weight-budget alone says how narrow FFNs get; leave --ffn out"),
        (["--kv-budget", "30%"], "leave --kv-budget out"),
        ([], "error: --emulation narrow needs --weight-budget, such as 90%"),
        (["--weight-budget", "80%", "--fuse"], "leave --fuse out"),
        (["--weight-budget", "80%", "--search", "greedy"], "leave --search greedy out"),
        (["--weight-budget", "80%", "--copying", "1"], "leave --copying out"),
        (["--weight-budget", "80%", "--format", "plan"], "holds no weights"),
    ],
)
def test_what_contradicts_it_is_refused_in_one_line(flags, message, pico_directory, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, pico_directory("llama"), "--output", tmp_path / "o", "--emulation", "narrow", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_budget_that_ffns_alone_do_not_meet_is_refused(pico_directory, text, tmp_path, monkeypatch, capsys):
    wanted = ["--output", tmp_path / "o", "--weight-budget", "20%", "--calibration", text]
    assert run(monkeypatch, pico_directory("llama"), *wanted, *QUICK) == 2
    assert "--weight-budget 20% is out of reach" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(model_type, pico_directory, tmp_path, monkeypatch, capsys):
    wanted = ["--output", tmp_path / "o", "--weight-budget", "80%", "--emulation", "narrow"]
    assert run(monkeypatch, pico_directory(model_type), *wanted) == 2
    assert "is for dense FFNs" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["adapters", "lora"])
def test_narrower_ffns_heal(how, pico_directory, text, tmp_path, monkeypatch):
    wanted = ["--output", tmp_path / "o", "--weight-budget", "85%", "--calibration", text, "--heal", how]
    assert run(monkeypatch, pico_directory("llama"), *wanted, "--heal-steps", "2", *QUICK) == 0
    assert verify(tmp_path / "o").quality["healing"]["parameters"] > 0


def test_a_narrowed_model_is_that_of_its_plan():
    """What `apply_plan` cuts is what the evaluator ran."""
    model, family = pico_model("llama"), FAMILIES["llama"]
    evaluator = Evaluator(model, family, tokens())
    plan = Plan(BLOCKS, {Sublayer(1, "ffn"): "narrow"}, units={1: 96})
    units = narrowings(evaluator, [1], 0, Reporter())[Sublayer(1, "ffn")].kept(96)
    found = recover(evaluator, plan.removed, 0, Reporter(), compensated=False, prepared={Sublayer(1, "ffn"): units})
    before = evaluator.loss(found.emulations)
    apply_recovery(model, family, plan, found)
    torch.testing.assert_close(Evaluator(model, family, tokens()).loss({}), before)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_sensitivities_predict_the_divergence_of_a_small_error(model_type):
    """Half of e'Se, with S for errors over the stream's mean square, is KL(dense || changed) for random errors."""
    model, family, ids = pico_model(model_type), FAMILIES[model_type], tokens(48)
    evaluator = Evaluator(model, family, ids, 4)
    projection = evaluator.blocks[1].get_submodule(f"{family.ffn}.{family.ffn_output}")
    felt = sensitivities(evaluator, {1: projection}, 10**6, 0, Reporter())[1]
    hidden, arguments = evaluator.embed(ids)
    for block in range(2):
        hidden = evaluator.run_block(block, hidden, arguments[block], {})
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) * 0.01
    noise *= hidden.square().mean(-1, keepdim=True).sqrt()
    dense = model(ids).logits[:, :-1].log_softmax(-1)
    handle = projection.register_forward_hook(lambda _, __, output: output + noise)
    changed = model(ids).logits[:, :-1].log_softmax(-1)
    handle.remove()
    divergence = float((dense.exp() * (dense - changed)).sum(-1).mean())
    assert divergence == pytest.approx(0.01**2 * float(felt.trace()) / 2, rel=0.2)
