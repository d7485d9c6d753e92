"""Tuning while pruning: the gated student, what gates learn, the plan that comes out, and the checkpoint."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning import narrowing, pipeline, windows
from pruning.console import Reporter
from pruning.families import FAMILIES
from pruning.forward.evaluator import Evaluator
from pruning.models.checkpoint import verify
from pruning.plan import Plan, Sublayer
from pruning.recipe import Recipe
from pruning.recovery.distillation import Teacher
from pruning.recovery.emulation import Recovery, recover
from pruning.recovery.gates import BudgetedGates, GatedHeads, GatedUnits
from pruning.recovery.healing import heal, prepared
from pruning.recovery.kept_units import narrower, whole_projections
from pruning.recovery.prune_aware import Gates, Tuning
from pruning.recovery.training import Judge, Lessons, Settings
from pruning.recovery.training_state import Carried, carry
from pruning.search import heads
from pruning.search.heads import HeadPlan
from pruning.search.selection import Judge as Judged
from pruning.variants.window_fit import limits
from pruning.windows import aware
from pruning.windows.plans import Choice
from tests.conftest import BLOCKS, pico_model, run_prune_export, tokens
from tests.pruning.recovery.healing_run import tensors_of

LLAMA, WINDOW = FAMILIES["llama"], 8
HEADS = list(itertools.product(range(BLOCKS), range(2)))
LIMITED = Plan(BLOCKS, {Sublayer(block, "attention"): "window" for block in range(BLOCKS)}, window=WINDOW)
SETTINGS = Settings(
    trained="lora", loss="kl", optimizer="adamw", learning_rate=2e-3, lora_rank=2, steps=10, minutes=None,
    batch_tokens=192, precision="no", seed=0,
)  # fmt: skip
FFNS = range(BLOCKS)
BUDGET = (5 + 7 / 8) / 12
"""Of a context of eight windows: five full heads of twelve."""


@pytest.fixture(scope="module")
def model():
    return pico_model("llama")


@pytest.fixture(scope="module")
def limited(model):
    found = limits(Evaluator(model, LLAMA, tokens(4, 64)), list(LIMITED.removed), WINDOW, Reporter())
    return {sublayer: each.window for sublayer, each in found.items()}


@pytest.fixture(scope="module")
def choice(model, limited):
    judges = [Judged("text", Evaluator(model, LLAMA, tokens(4, 64), 2))]
    scores = heads.score(judges, limited, 1, Reporter())
    return Choice(
        scores, windows.Limits(limited, limited), frozenset(HEADS), frozenset(), WINDOW, 8 * WINDOW, "head",
        lambda share: tuple(scores),
    )  # fmt: skip


def gates_of(scores):
    cost = torch.full((len(HEADS),), 7 / 8, dtype=torch.float64)
    return Gates(scores.double(), cost, 5 * 7 / 8)


def tuned(model, limited, gates, settings, reporter=None, state=None):
    lessons = Lessons(tokens(24, 64, seed=3), tokens(4, 64, seed=4), settings, "")
    tuning = Tuning(model, LLAMA, lessons, reporter or Reporter(), state)
    return tuning.heads(LIMITED, limited, gates, [[head] for head in HEADS])


def test_a_student_with_open_and_shut_gates_is_the_plan(model, limited):
    full = {(0, 1), (2, 0), (3, 0), (3, 1), (5, 1)}
    training = prepared(model, LLAMA, LIMITED, Recovery(dict(limited), {}), 0, SETTINGS)
    scores = torch.tensor([99.0 if head in full else -99.0 for head in HEADS])
    gates = gates_of(scores)
    budgeted = BudgetedGates(gates.scores, gates.costs, gates.capacity)
    student = GatedHeads(training.student, budgeted, list(training.emulations.values()), torch.arange(12).view(6, 2))
    rows = tokens(3, 64, seed=5)
    found = Judge(Teacher(model, LLAMA, 0), rows)(student)
    plan = heads.limited(limited, frozenset(full))
    evaluator = Evaluator(model, LLAMA, rows)
    assert found.kl == pytest.approx(float(evaluator.values([plan], "kl").mean()), rel=1e-4)
    assert found.loss == pytest.approx(float(evaluator.loss(plan).mean()), rel=1e-6)


def test_gates_that_know_nothing_learn_which_heads_are_worth_most(model, limited):
    """Of frozen weights, against what limiting each head alone does to the dense distribution."""
    rows = tokens(24, 64, seed=3)
    evaluator = Evaluator(model, LLAMA, rows)
    alone = [heads.limited(limited, frozenset(HEADS) - {head}) for head in HEADS]
    worth = evaluator.values(alone, "kl").mean(1)
    still = replace(SETTINGS, learning_rate=1e-12, steps=60, batch_tokens=256)
    change, _ = tuned(model, limited, gates_of(torch.zeros(len(HEADS))), still)
    assert float(torch.corrcoef(torch.stack([worth.log(), change]))[0, 1]) > 0.6
    best, worst = set(worth.topk(3).indices.tolist()), set((-worth).topk(3).indices.tolist())
    assert change[list(best)].mean() > change[list(worst)].mean()


def test_what_comes_out_is_a_plan_within_the_budget(choice):
    plan = choice.plan(BUDGET)
    heads_of, gates = aware.gates_of(choice, plan, BUDGET)
    assert len(heads_of) == len(HEADS)
    assert gates.capacity == pytest.approx(5 * 7 / 8)
    order = gates.scores.argsort(descending=True).tolist()
    assert {heads_of[number][0] for number in order[:5]} == plan.full
    worst = order[-1]
    change = torch.zeros(len(HEADS), dtype=torch.float64)
    change[worst] = 8.0
    found = aware.learned(choice, plan, BUDGET, heads_of, change)
    assert found.full == plan.full - {heads_of[order[4]][0]} | {heads_of[worst][0]}
    assert choice.share(found) <= BUDGET


def test_windows_keep_the_sizes_that_they_have(choice):
    several = replace(choice, scores={1.0: choice.usual, 2.0: choice.usual, 0.5: choice.usual})
    sizes = ((0, 2.0), (3, 0.5))
    plan = HeadPlan(frozenset({(1, 0), (4, 0)}), sizes)
    heads_of, gates = aware.gates_of(several, plan, 0.4)
    costs = dict(zip((each for (each,) in heads_of), gates.costs.tolist(), strict=True))
    assert [costs[block, 0] for block in (0, 1, 3)] == pytest.approx([6 / 8, 7 / 8, 15 / 16])
    change = torch.randn(len(HEADS), generator=torch.Generator().manual_seed(0)).double()
    found = aware.learned(several, plan, 0.4, heads_of, change)
    assert set(found.sizes) <= set(sizes)
    assert several.share(found) <= 0.4


def test_whole_layers_share_a_gate_where_the_plan_takes_them(choice):
    layers = replace(choice, by="auto")
    plan = HeadPlan(frozenset({(2, 0), (2, 1), (4, 0), (4, 1)}))
    heads_of, _ = aware.gates_of(layers, plan, layers.share(plan))
    assert [len(members) for members in heads_of] == [2] * BLOCKS
    change = torch.randn(BLOCKS, generator=torch.Generator().manual_seed(1)).double()
    found = aware.learned(layers, plan, layers.share(plan), heads_of, change)
    assert len(found.full) == 4
    assert layers.takes_layers(found)


def test_without_an_update_it_is_the_ordinary_choice_untrained(model, limited, choice):
    plan = choice.plan(BUDGET)
    (heads_of, gates), nothing = aware.gates_of(choice, plan, BUDGET), replace(SETTINGS, steps=None, minutes=0.0)
    change, carried = tuned(model, limited, gates, nothing)
    assert carried.step == 0
    assert aware.learned(choice, plan, BUDGET, heads_of, change) is plan
    emulations = heads.limited(limited, plan.full)
    hard = replace(LIMITED, removed={each: "window" for each in emulations})
    start, rows = Recovery(dict(emulations), {}), (tokens(24, 64, seed=3), tokens(4, 64, seed=4))
    healed, record = heal(model, LLAMA, hard, start, *rows, replace(SETTINGS, steps=0), Reporter())
    after, other = heal(model, LLAMA, hard, start, *rows, nothing, Reporter(), carried=carried)
    assert record["steps"] == other["steps"] == 0
    assert record["end"] == other["end"] == record["start"]
    assert healed is after is start


def test_healing_goes_on_from_what_was_trained_with_the_gates(model, limited, choice):
    plan = choice.plan(BUDGET)
    heads_of, gates = aware.gates_of(choice, plan, BUDGET)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    change, carried = tuned(model, limited, gates, SETTINGS)
    assert carried.step == 4
    assert any(bool(tensor.any()) for name, tensor in carried.parameters.items() if name.endswith(".up"))
    emulations = heads.limited(limited, aware.learned(choice, plan, BUDGET, heads_of, change).full)
    hard = replace(LIMITED, removed={each: "window" for each in emulations})
    start = Recovery(dict(emulations), {})
    given = tokens(24, 64, seed=3), tokens(4, 64, seed=4)
    at_once = replace(SETTINGS, steps=4)
    _, record = heal(model, LLAMA, hard, start, *given, SETTINGS, Reporter(), carried=carried)
    assert [point["step"] for point in record["curve"]] == [0, 4, 5, 6, 7, 8, 9, 10]
    kept, record = heal(model, LLAMA, hard, start, *given, at_once, Reporter(), carried=carried)
    assert record["steps"] == 4
    if record["improved"]:
        name = next(name for name in kept.weights if "mlp.up_proj" in name)
        down, up = (carried.parameters[f"{name.removesuffix('.weight')}.{part}"] for part in ("down", "up"))
        torch.testing.assert_close(kept.weights[name], model.get_parameter(name) + 2 * up @ down)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


class Killed(Reporter):
    """Ends the run at a step, whose state is written."""

    def say(self, text: str) -> None:
        if "step 2 " in text:
            raise InterruptedError


def test_a_stopped_run_goes_on_to_the_same_gates_and_weights(model, limited, choice, tmp_path):
    _, gates = aware.gates_of(choice, choice.plan(BUDGET), BUDGET)
    whole, one = tuned(model, limited, gates, SETTINGS)
    state = tmp_path / "state.safetensors"
    with pytest.raises(InterruptedError):
        tuned(model, limited, gates, SETTINGS, Killed(), state)
    resumed, other = tuned(model, limited, gates, SETTINGS, state=state)
    assert whole.any()
    assert torch.equal(whole, resumed)
    assert all(torch.equal(tensor, other.parameters[name]) for name, tensor in one.parameters.items())
    again, third = tuned(model, limited, gates, SETTINGS, state=state)
    assert torch.equal(whole, again)
    assert third.step == one.step


def narrowing_of(model_type):
    """A tiny model, the order in which its FFNs lose units, and FFNs narrowed by it to 80% of all bytes."""
    model, family = pico_model(model_type), FAMILIES[model_type]
    dense = SimpleNamespace(model=model, family=family)
    evaluator = Evaluator(model, family, tokens(8, 64))
    recipe, found = Recipe(emulation="narrow", weight_budget="80%"), narrowing.orders(evaluator, FFNS, 0, Reporter())
    _, kept = narrowing.choose(dense, recipe, found, Reporter())
    recovery = recover(evaluator, dict.fromkeys(kept, "narrow"), 0, Reporter(), compensated=False, prepared=kept)
    return dense, recipe, found, kept, recovery


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_gates_of_units_begin_at_the_ordinary_choice_and_nothing_is_lost_at_the_cut(model_type):
    dense, _, found, kept, recovery = narrowing_of(model_type)
    model, family = dense.model, dense.family
    refitted = whole_projections(model, family, recovery, kept)
    training = prepared(model, family, Plan(BLOCKS, {}), Recovery({}, refitted), 0, SETTINGS)
    projections = [training.changes[f"{family.blocks}.{block}.mlp.down_proj"] for block in FFNS]
    stays = torch.zeros(BLOCKS, projections[0].in_features, dtype=torch.long)
    for sublayer in found:
        stays[sublayer.block, kept.get(sublayer, torch.arange(stays.shape[1]))] = 1
    gates = BudgetedGates(torch.tensor([-99.0, 99.0]), torch.ones(2), 1.0)
    student, rows = GatedUnits(training.student, gates, projections, stays), tokens(3, 64, seed=5)
    judge = Judge(Teacher(model, family, 0), rows)
    evaluator = Evaluator(model, family, rows)
    assert judge(student).kl == pytest.approx(float(evaluator.values([recovery.emulations], "kl").mean()), rel=1e-3)
    for number, change in enumerate(training.changes.values()):
        torch.nn.init.normal_(change.up, std=0.02, generator=torch.Generator().manual_seed(number))
    trained = judge(student)
    carried = Carried({name: each.detach() for name, each in training.parameters.items()}, {}, 4, 0.0)
    emulations, carried = narrower(model, family, refitted, kept, carried)
    assert tensors_of(Recovery(emulations, {})).keys() == tensors_of(recovery).keys()
    assert all(
        torch.equal(tensors_of(recovery)[name], each) for name, each in tensors_of(Recovery(emulations, {})).items()
    )
    plan = Plan(BLOCKS, dict.fromkeys(kept, "narrow"), units={each.block: len(units) for each, units in kept.items()})
    cut = prepared(model, family, plan, Recovery(emulations, {}), 0, SETTINGS)
    carry(carried, cut.parameters, torch.optim.AdamW(cut.parameters.values()))
    assert judge(cut.student).kl == pytest.approx(trained.kl, rel=1e-3)


def test_units_that_stay_are_within_the_bytes_whatever_gates_learn():
    dense, recipe, found, kept, _ = narrowing_of("llama")
    gates = narrowing.gates_of(dense, recipe, found)
    assert len(gates.scores) == sum(map(len, narrowing.groups_of(found).values()))
    least = narrowing.excess_bytes(dense, recipe)
    assert 0 < gates.capacity < float(gates.costs.sum())
    each = narrowing.unit_bytes(dense, Sublayer(0, "ffn"))
    for seed in range(3):
        change = torch.randn(len(gates.scores), generator=torch.Generator().manual_seed(seed)).double()
        stay = narrowing.learned(dense, recipe, found, gates, change)
        gone = sum(192 - len(units) for units in stay.values()) * each
        assert least <= gone < least + 8 * each
        assert all(len(units) % 8 == 0 and len(units) >= 8 for units in stay.values())
        assert all(units.unique().tolist() == units.tolist() for units in stay.values())
    up = torch.zeros(len(gates.scores), dtype=torch.float64)
    groups = narrowing.groups_of(found)[2]
    first = sum(len(each) for block, each in narrowing.groups_of(found).items() if block < 2)
    up[first] = 9.0
    stay = narrowing.learned(dense, recipe, found, gates, up)
    assert not set(groups[0].tolist()) & set(kept[Sublayer(2, "ffn")].tolist())
    assert set(groups[0].tolist()) <= set(stay[Sublayer(2, "ffn")].tolist())


def test_units_without_an_update_are_the_ordinary_choice():
    dense, recipe, found, kept, recovery = narrowing_of("llama")
    lessons = Lessons(tokens(24, 64, seed=3), tokens(4, 64, seed=4), replace(SETTINGS, steps=0), "")
    given = dense, recipe, found, kept, recovery, lessons
    stay, same, carried = narrowing.tuned(*given, Path("nowhere"), Reporter())
    assert same is recovery
    assert carried is None
    assert stay.keys() == kept.keys()
    assert all(torch.equal(units, kept[each]) for each, units in stay.items())


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    return path


pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["--calibration-tokens", "512", "--heal", "prune-aware", "--heal-steps", "10", "--heal-batch-tokens", "256",
       "--heal-lora-rank", "2"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--kv-budget", "50%", "--context", "128", "--codes", "0", "--held-out-tokens", "128"],
            "full KV heads gave way to others",
        ),
        (["--weight-budget", "80%", "--emulation", "narrow"], "units stay that the ordinary choice lets go"),
    ],
    ids=["windows", "narrower FFNs"],
)
def test_the_checkpoint_is_the_trained_model(monkeypatch, pico_directory, long_text, tmp_path, capsys, flags, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained, measure = {}, pipeline._cut_and_measure

    def measured(dense, *rest):
        quality = measure(dense, *rest)
        trained["model"] = dense.model
        return quality

    monkeypatch.setattr(pipeline, "_cut_and_measure", measured)
    output = tmp_path / "out"
    command = [pico_directory(), "--output", output, "--calibration", long_text, *flags, *FEW]
    assert run_prune_export(monkeypatch, *command) == 0
    manifest = verify(output)
    what, share = ("weights", 0.8) if "narrow" in flags else ("kv_request", 0.5)
    assert manifest.sizes[what] <= share * manifest.sizes[f"{what}_dense"]
    assert manifest.recipe["heal"] == "prune-aware"
    assert manifest.quality["healing"]["steps"] == 10
    assert {"tune", "heal"} <= manifest.stages.keys()
    rows = tokens(2, 256, seed=7)
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(output)(rows).logits
        torch.testing.assert_close(found, trained["model"](rows).logits, rtol=1e-5, atol=1e-5)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attention", "2"], "a KV budget or a loss"),
        (["--window-by", "layer"], "not --task, --window-by layer"),
        (["--search", "exchange"], "--search exchange"),
        (["--emulation", "low-rank"], "asks for low-rank; use --heal lora"),
        (["--weight-budget", "90%"], "asks for low-rank; use --heal lora"),
        (["--format", "plan"], "--heal prune-aware changes some"),
    ],
)
def test_what_gates_cannot_choose_is_refused_in_one_line(
    monkeypatch, pico_directory, long_text, tmp_path, capsys, flags, says
):
    output = tmp_path / "out"
    command = [pico_directory(), "--output", output, "--calibration", long_text, "--heal", "prune-aware", *flags]
    assert run_prune_export(monkeypatch, *command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not output.exists()
