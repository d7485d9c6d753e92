"""The final norm of a pruned model, scaled to be as sure as the dense one."""

import pytest
import torch
from safetensors.torch import load_file

from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.plan import Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import recover
from pruning.recovery.fuse import fuse
from pruning.recovery.recalibration import _Divergence, _scaled, recalibrate
from tests.conftest import divergence, pico_model, run_prune_export, tokens

PLAN = Plan(6, {Sublayer(block, "attention"): "low_rank" for block in (1, 2, 4)}, rank=4)
CAPPED = [name for name in FAMILIES if getattr(pico_model(name).config, "final_logit_softcapping", None)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_new_parameters_scale_what_the_norm_gives(model_type):
    norm = Head(pico_model(model_type), FAMILIES[model_type]).norm
    scale, states = 1 + 0.2 * torch.randn(128), torch.randn(5, 128)
    expected = norm(states) * scale
    parameters = _scaled(norm, scale)
    assert parameters
    for name, tensor in parameters.items():
        norm.get_parameter(name).data = tensor
    torch.testing.assert_close(norm(states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "granite", "cohere"])  # the latter two scale their logits
def test_value_and_gradient_are_those_of_the_divergence(model_type):
    model = pico_model(model_type)
    head = Head(model, FAMILIES[model_type])
    dense, pruned = torch.randn(2, 600, 128)
    found = _Divergence(head)
    found.add(dense, pruned)

    def plain(scale):
        project = lambda rows: head.projection(rows) / head.scaling  # noqa: E731
        return divergence(project(head.norm(dense)), project(head.norm(pruned) * scale))

    one, scale = torch.ones(128), (1 + 0.1 * torch.randn(128)).requires_grad_(True)
    expected = plain(scale)
    expected.backward()
    value, gradient = found(scale.detach())
    assert value - found(one)[0] == pytest.approx(float(expected.detach() - plain(one)), abs=1e-5)
    torch.testing.assert_close(gradient, scale.grad, atol=1e-6, rtol=1e-4)


def _exported_divergence(model_type: str, *, recalibrated: bool) -> tuple[float, set[str]]:
    model, family, others = pico_model(model_type), FAMILIES[model_type], tokens(6, seed=9)
    with torch.inference_mode():
        dense = model(others).logits
    evaluator = Evaluator(model, family, tokens(30))
    recovery = recover(evaluator, PLAN.removed, 4, Reporter(), compensated=False, recalibrated=recalibrated)
    apply_recovery(model, family, PLAN, recovery)
    with torch.inference_mode():
        return float(divergence(dense, model(others).logits)), set(recovery.weights)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in CAPPED])
def test_pruned_models_come_nearer_to_the_dense_distribution(model_type):
    before, unchanged = _exported_divergence(model_type, recalibrated=False)
    after, changed = _exported_divergence(model_type, recalibrated=True)
    assert not unchanged
    assert {name.rpartition(".")[0] for name in changed} == {FAMILIES[model_type].norm}
    assert after < before


def test_fusing_recalibrates_too():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(30))
    assert "model.norm.weight" in fuse(evaluator, PLAN.removed, 4, Reporter(), biased=True, recalibrated=True).weights


@pytest.mark.parametrize("model_type", CAPPED)
def test_capped_logits_are_left_alone(model_type):
    assert not _exported_divergence(model_type, recalibrated=True)[1]


def test_nothing_changes_without_windows_to_hold_out_or_a_difference():
    evaluator = Evaluator(pico_model("llama"), FAMILIES["llama"], tokens(8))
    states = torch.randn(8, 20, 128)
    assert not recalibrate(evaluator, [states[:4]], [states[:4] + 1], Reporter())
    assert not recalibrate(evaluator, [states], [states], Reporter())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "same"),
    [
        ((), True),
        (("--recalibrate",), False),
        (("--compensate",), False),
        (("--compensate", "--no-recalibrate"), True),
        (("--fuse",), False),
    ],
)
def test_recalibrated_where_it_helps_or_is_asked_for(options, same, pico_directory, text, tmp_path, monkeypatch):
    source, short = pico_directory("llama"), tmp_path / "short.txt"
    short.write_text(text.read_text()[:4440])
    arguments = ("--calibration", short, "--sequence-length", 32, "--calibration-tokens", 1920, "--rank", 4,
                 "--emulation", "low-rank")  # fmt: skip
    output = tmp_path / "out"
    assert run_prune_export(monkeypatch, source, "--output", output, "--attention", 2, *arguments, *options) == 0
    old, new = (load_file(path / "model.safetensors")["model.norm.weight"] for path in (source, output))
    assert torch.equal(old, new) == same
