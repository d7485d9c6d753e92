"""Training after the closed-form emulation: what it computes, that it never harms, that it survives a kill."""

import copy
import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from pruning import stages
from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.models.checkpoint import verify
from pruning.plan import Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.distillation import Student, Teacher, cut_copy, head_gradient
from pruning.recovery.emulation import recover
from pruning.recovery.healing import first_block, heal
from pruning.recovery.lora import add_lora
from pruning.recovery.spam import SPAM, rewarmed
from pruning.recovery.training import Judge, batch_of, schedule
from tests.conftest import run_prune_export as run_cli

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).with_name("healing_run.py")
_spec = importlib.util.spec_from_file_location("healing_run", SCRIPT)
healing_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(healing_run)
PLAN, SETTINGS = healing_run.PLAN, healing_run.SETTINGS
pico_model, tokens, tensors_of = healing_run.pico_model, healing_run.tokens, healing_run.tensors_of

DROPS = Plan(
    6,
    {
        Sublayer(2, "attention"): "context",
        Sublayer(3, "attention"): "none",
        Sublayer(3, "ffn"): "none",
        Sublayer(4, "attention"): "context",
    },
    rank=4,
)


@pytest.fixture(scope="module")
def own_text():
    """Windows that the tiny model wrote itself, so that being close to it and predicting them well go together."""
    model = pico_model("llama")
    torch.manual_seed(0)
    prompt = torch.randint(3, 320, (40, 1))
    rows = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=47, min_new_tokens=47, pad_token_id=0)
    return rows[:32], rows[32:]


def start_of(model, family, plan):
    return recover(Evaluator(model, family, tokens()), plan.removed, plan.rank, Reporter(), compensated=False)


@pytest.mark.parametrize("plan", [PLAN, DROPS], ids=["kept blocks", "dropped block, context"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_student_is_the_pruned_model(model_type, plan):
    """Prefix, masks and taps included: the figures are those of the evaluator that knows nothing of students."""
    model, family = pico_model(model_type), FAMILIES[model_type]
    recovery = start_of(model, family, plan)
    first = first_block(recovery.emulations, "adapters")
    cut = cut_copy(model, family, plan, copy.deepcopy(recovery.emulations), {})
    rows = tokens(3, seed=5)
    found = Judge(Teacher(model, family, first), rows)(Student(cut, family, first))
    evaluator = Evaluator(model, family, rows)
    assert found.kl == pytest.approx(float(evaluator.values([recovery.emulations], "kl").mean()), rel=1e-4)
    assert found.loss == pytest.approx(float(evaluator.values([recovery.emulations], "loss").mean()), rel=1e-6)
    assert first == 1 if plan is DROPS else 2


@pytest.mark.parametrize("loss", ["kl", "next-token"])
@pytest.mark.parametrize("model_type", ["gemma2", "granite"])
def test_the_gradient_at_the_head_is_that_of_autograd(model_type, loss):
    """With a cap on the logits, and with scaled logits."""
    fields = {"logits_scaling": 3.0} if model_type == "granite" else {"final_logit_softcapping": 2.0}
    model = pico_model(model_type, **fields)
    head, rows = Head(model, FAMILIES[model_type]), tokens(3, 12)
    final, reference = torch.randn(2, 3, 12, 128, generator=torch.Generator().manual_seed(0))
    value, gradient = head_gradient(head, loss, final, reference, rows)
    leaf = final.clone().requires_grad_(True)
    scores = functional.log_softmax(head.logits(leaf), -1)
    target = functional.log_softmax(head.logits(reference), -1)
    expected = (
        functional.kl_div(scores, target, log_target=True, reduction="batchmean")
        if loss == "kl"
        else functional.nll_loss(scores, rows[:, 1:].flatten())
    )
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trained", ["adapters", "lora"])
@pytest.mark.parametrize(
    ("loss", "optimizer", "plan"), [("kl", "spam", DROPS), ("next-token", "adamw", PLAN), ("hidden", "adamw", PLAN)]
)
def test_healing_improves_and_leaves_the_dense_model_alone(own_text, trained, loss, optimizer, plan):
    model, family = pico_model("llama"), FAMILIES["llama"]
    recovery = start_of(model, family, plan)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    adapters = tensors_of(recovery)
    old = {name: tensor.clone() for name, tensor in adapters.items()}
    settings = replace(SETTINGS, trained=trained, loss=loss, optimizer=optimizer, steps=20)
    rows, validation = own_text
    healed, record = heal(model, family, plan, recovery, rows, validation, settings, Reporter())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(tensor, old[name]) for name, tensor in adapters.items())
    assert record["improved"]
    assert record["end"]["loss"] < record["start"]["loss"]
    assert bool(healed.weights) == (trained == "lora")
    apply_recovery(model, family, plan, healed)
    with torch.no_grad():
        scores = model(validation).logits[:, :-1].flatten(0, 1)
    assert float(functional.cross_entropy(scores, validation[:, 1:].flatten())) == pytest.approx(
        record["end"]["loss"], rel=1e-5
    )


def test_a_run_that_only_harms_gives_back_its_start():
    model, family = pico_model("llama"), FAMILIES["llama"]
    recovery = start_of(model, family, PLAN)
    wild = replace(SETTINGS, learning_rate=50.0)
    healed, record = heal(model, family, PLAN, recovery, tokens(21, seed=3), tokens(4, seed=4), wild, Reporter())
    assert healed is recovery
    assert not record["improved"]
    assert record["end"] == record["start"]
    assert min(point["kl"] for point in record["curve"][1:]) > record["start"]["kl"]


def test_mixed_precision_trains_in_float32_and_stores_in_the_models_dtype(own_text):
    model, family = pico_model("llama").to(torch.bfloat16), FAMILIES["llama"]
    recovery = start_of(model, family, PLAN)
    settings = replace(SETTINGS, precision="bf16", steps=20)
    healed, record = heal(model, family, PLAN, recovery, *own_text, settings, Reporter())
    assert record["improved"]
    assert {tensor.dtype for tensor in tensors_of(healed).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    state = tmp_path / "state.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "never"), str(state), "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state.exists()
    whole, whole_record = healing_run.run(None, Reporter())
    resumed, record = healing_run.run(state, Reporter())
    assert record["steps"] == whole_record["steps"] == 10
    for name, tensor in tensors_of(whole).items():
        assert torch.equal(tensors_of(resumed)[name], tensor), name
    strip = [{k: v for k, v in point.items() if k != "seconds"} for point in record["curve"]]
    assert strip == [{k: v for k, v in point.items() if k != "seconds"} for point in whole_record["curve"]]


def test_state_of_another_request_is_not_taken(tmp_path):
    model, family = pico_model("llama"), FAMILIES["llama"]
    recovery = start_of(model, family, PLAN)
    state = tmp_path / "state.safetensors"
    given = (model, family, PLAN, recovery)
    heal(*given, tokens(21, seed=3), tokens(4, seed=4), replace(SETTINGS, steps=2), Reporter(), state=state)
    kept = state.read_bytes()
    rows = tokens(21, seed=6)
    fresh, _ = heal(*given, rows, tokens(4, seed=4), replace(SETTINGS, steps=2), Reporter())
    mixed, _ = heal(*given, rows, tokens(4, seed=4), replace(SETTINGS, steps=2), Reporter(), state=state)
    assert all(torch.equal(tensors_of(mixed)[name], tensor) for name, tensor in tensors_of(fresh).items())
    assert state.read_bytes() != kept
    state.write_bytes(b"cut off")
    again, _ = heal(*given, rows, tokens(4, seed=4), replace(SETTINGS, steps=2), Reporter(), state=state)
    assert all(torch.equal(tensors_of(again)[name], tensor) for name, tensor in tensors_of(fresh).items())


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = tmp_path / "two.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(SCRIPT), str(result)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, _ = healing_run.run(None, Reporter())
    two = load_file(result)
    assert two.keys() == tensors_of(one).keys()
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_merged_change_is_the_change():
    model = pico_model("phi3")
    block = model.model.layers[0]
    hidden = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    plain = block.mlp(hidden)
    made = add_lora(block.mlp, 4, torch.Generator().manual_seed(0))
    assert set(made) == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(block.mlp(hidden), plain, rtol=0, atol=0)
    for change in made.values():
        torch.nn.init.normal_(change.up, std=0.1)
    apart = block.mlp(hidden)
    assert float((apart - plain).abs().max()) > 1e-2
    for change in made.values():
        change.weight.data = change.merged()
        torch.nn.init.zeros_(change.up)
    torch.testing.assert_close(block.mlp(hidden), apart, rtol=1e-5, atol=1e-5)


def steps_of(gradients, **options):
    """A parameter of two entries after each of several updates."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = SPAM([weight], lr=0.1, **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        yield weight.detach().clone(), optimizer.state[weight]


def test_spam_cuts_a_spike_to_its_bound_and_leaves_the_other_entry():
    *_, (_, before) = steps_of([[1.0, 1.0]] * 10)
    second = before["exp_avg_sq"].clone() / (1 - 0.999**10)
    *_, (_, after) = steps_of([[1.0, 1.0]] * 10 + [[1e6, -1.0]], theta=50.0)
    bound = (50.0 * second[0]).sqrt()
    assert bound == pytest.approx(50**0.5)
    momentum = 1 - 0.9**10
    assert after["exp_avg"][0] == pytest.approx(0.9 * momentum + 0.1 * float(bound), rel=1e-5)
    assert after["exp_avg"][1] == pytest.approx(0.9 * momentum - 0.1, rel=1e-5)
    *_, (_, negative) = steps_of([[1.0, 1.0]] * 10 + [[-1e6, 1.0]], theta=50.0)
    assert negative["exp_avg"][0] == pytest.approx(0.9 * momentum - 0.1 * float(bound), rel=1e-5)


def test_spam_without_spikes_and_resets_is_adam():
    gradients = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).tolist()
    weight = torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.999))
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        adam.step()
    *_, (found, _) = steps_of(gradients)
    torch.testing.assert_close(found, weight.detach(), rtol=1e-4, atol=1e-6)


def test_spam_forgets_its_moments_and_warms_up_again():
    path = list(steps_of([[1.0, 1.0]] * 4 + [[-1.0, -1.0]] * 4, interval=4, warmup=3))
    positions = [float(weight[0]) for weight, _ in path]
    # Adam would still move down after the sign changed; with the moments gone the first step is already up.
    assert positions[4] > positions[3]
    moves = [b - a for a, b in pairwise(positions[3:])]
    assert moves == pytest.approx([0.1 * rewarmed(age, 3) for age in range(4)], rel=1e-4)
    assert moves == sorted(moves)
    assert rewarmed(3, 3) == 1.0


def test_the_schedule_rises_then_falls_and_windows_come_in_whole_permutations():
    rates = [schedule(share / 200) for share in range(200)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < min(rates) < 0.1
    assert max(rates) == pytest.approx(1)
    drawn = [window for step in range(7) for window in batch_of(step, 3, 7, seed=0)]
    assert [sorted(drawn[first : first + 7]) for first in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


QUICK = [
    "--calibration-tokens",
    "512",
    "--score-tokens",
    "128",
    "--sequence-length",
    "64",
    "--rank",
    "4",
]


def test_a_healed_export_is_whole_and_records_how(monkeypatch, pico_directory, text, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    losses = {}
    healing = ["--heal", "lora", "--heal-loss", "next-token", "--heal-steps", "8", "--heal-lora-rank", "2"]
    for name, flags in {"plain": [], "healed": healing}.items():
        output = tmp_path / name
        command = [pico_directory(), "--output", output, "--calibration", text, "--attention", 2, *QUICK, *flags]
        command += ["--emulation", "low-rank"]
        assert run_cli(monkeypatch, *command, "--heal-batch-tokens", 128) == 0
        losses[name] = verify(output).quality
    assert "healing" not in losses["plain"]
    record = losses["healed"]["healing"]
    assert record["improved"]
    assert record["tokens"] == 8 * 128
    assert losses["healed"]["pruned_loss"] < losses["plain"]["pruned_loss"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert "heal" in verify(tmp_path / "healed").stages


def test_without_files_healing_is_judged_by_windows_of_neither_fit_nor_training(monkeypatch, pico_directory, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given, fit, train = {}, stages.recovered, stages.heal

    def recovered(dense, plan, recipe, tokens, *rest):
        given["fitted"] = tokens
        return fit(dense, plan, recipe, tokens, *rest)

    def heal(model, family, plan, recovery, rows, validation, *rest, **options):
        given.update(rows=rows, validation=validation)
        return train(model, family, plan, recovery, rows, validation, *rest, **options)

    monkeypatch.setattr("pruning.pipeline.recovered", recovered)
    monkeypatch.setattr(stages, "heal", heal)
    flags = ["--attention", 2, "--emulation", "low-rank", *QUICK, "--heal", "adapters", "--heal-steps", 1]
    assert run_cli(monkeypatch, pico_directory(), "--output", tmp_path / "out", *flags) == 0
    windows = {name: {tuple(row) for row in rows.tolist()} for name, rows in given.items()}
    assert windows["validation"]
    assert not windows["validation"] & (windows["fitted"] | windows["rows"])
    assert windows["fitted"] < windows["rows"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--emulation", "none", "--heal", "adapters"], "nothing to train"),
        (["--blocks", "2", "--format", "llama", "--heal", "adapters"], "--heal lora"),
        (["--heal", "lora", "--fuse"], "--heal trains adapters and --fuse leaves none"),
        (["--heal-minutes", "5"], "need --heal adapters"),
        (["--heal", "lora", "--heal-minutes", "0"], "--heal-minutes"),
        (["--heal", "lora", "--heal-learning-rate", "-1"], "--heal-learning-rate"),
        (["--heal", "lora", "--dtype", "float16", "--device", "cpu"], "float16 on a CPU"),
    ],
)
def test_what_cannot_be_healed_is_refused_in_one_line(monkeypatch, pico_directory, text, tmp_path, capsys, flags, says):
    output = tmp_path / "out"
    arguments = ["--output", output, "--calibration", text, *QUICK, *flags]
    assert run_cli(monkeypatch, pico_directory(), *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not output.exists()
