"""The time of a run before it: what it grows with, and the constants against what was measured once."""

import pytest

from pruning.budget import counts, resolved
from pruning.console import Reporter, duration
from pruning.estimate import TIMED_TOKENS, Size, in_seconds, size_of, stages_of, timed_forward
from pruning.families import FAMILIES
from pruning.models.loading import DenseModel
from pruning.recipe import Recipe
from pruning.recipes import find, read, shipped
from tests.conftest import pico_model

SMOLLM = Size(30, 106_203_456, 26_542_080, 28_311_552, 576, 4 * 134_515_008)
FORWARD_CPU_SECONDS = 0.64
"""Of 256 tokens, SmolLM2-135M in float32 on one core."""

BUDGET = {"kv_budget": "30%"}


def seconds(**keys: object) -> dict[str, float]:
    recipe = resolved(Recipe(**keys), 8192)
    return in_seconds(
        stages_of(recipe, counts(recipe, 30), SMOLLM), SMOLLM, FORWARD_CPU_SECONDS, FORWARD_CPU_SECONDS, recipe
    )


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_has_an_estimate_in_proportion_to_the_forward(name):
    recipe = resolved(Recipe.model_validate(read(find(name))), 8192)
    work = stages_of(recipe, counts(recipe, 30), SMOLLM)
    assert work["score"] > 0
    one, two = (in_seconds(work, SMOLLM, 1.0, fitting, recipe) for fitting in (1.0, 2.0))
    assert two["score"] == pytest.approx(2 * one["score"])
    assert two["export"] == one["export"]


@pytest.mark.parametrize(
    ("less", "more", "stage"),
    [
        ({}, {"calibration_tokens": 8192}, "score"),
        ({}, {"samples": 2}, "score"),
        ({"codes": 0}, {}, "score"),
        (BUDGET, {"importance": "leave-one-out", **BUDGET}, "score"),
        ({"context": 2048, **BUDGET}, BUDGET, "export"),
        (BUDGET, {"max_loss_increase": 0.1}, "score"),
        (BUDGET, {}, "score"),
        ({"emulation": "low-rank"}, {"emulation": "low-rank", "search": "greedy"}, "score"),
        ({"emulation": "low-rank"}, {"emulation": "low-rank", "compensate": True}, "emulate"),
        ({"emulation": "none"}, {"emulation": "low-rank"}, "emulate"),
        ({"heal": "lora", "heal_steps": 10}, {"heal": "lora", "heal_steps": 20}, "heal"),
    ],
)
def test_more_work_takes_longer(less, more, stage):
    assert 0 <= seconds(**less)[stage] < seconds(**more)[stage]


def test_time_to_train_is_taken_as_it_was_asked_for():
    assert seconds(heal="lora", heal_minutes=2.5)["heal"] == 150
    assert seconds(heal="lora")["heal"] == 1800
    gates = seconds(heal="prune-aware", heal_minutes=10)
    assert (gates["tune"], gates["heal"]) == pytest.approx((240, 360))
    assert "heal" not in seconds()


def test_what_a_run_took():
    found = seconds(calibration_tokens=3072, window_sizes="one", **BUDGET)
    assert found["score"] == pytest.approx(73, rel=0.15)
    assert found["export"] == pytest.approx(123, rel=0.15)


def test_sizes_of_a_model_and_its_timed_forward():
    model = pico_model("llama")
    dense = DenseModel("pico", None, model, None, FAMILIES["llama"], "")
    size = size_of(dense)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert (size.layers, size.block_weights, size.width) == (6, blocks, 128)
    assert size.head_weights == model.lm_head.weight.numel()
    assert 0 < timed_forward(dense) < 10
    assert model.config.max_position_embeddings >= TIMED_TOKENS


@pytest.mark.parametrize(
    ("given", "text"),
    [(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (1234, "21 min"), (3900, "1 h 5 min")],
)
def test_durations(given, text):
    assert duration(given) == text


def test_stages_say_what_is_left(capsys):
    reporter = Reporter()
    with reporter.stage("load"):
        pass
    reporter.expect({"score": 70.0, "emulate": 1.0, "export": 50.0})
    for name in ("score", "emulate", "export"):
        with reporter.stage(name):
            pass
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "load ..."
    assert printed[2] == "score ... about 1 min 10 s, 2 min 1 s left"
    assert printed[4] == "emulate ..."
    assert printed[6] == "export ... about 50 s, 50 s left"
    assert reporter.estimate == pytest.approx(121, abs=1)


def test_progress_says_what_is_left_after_two_seconds_and_then_every_ten(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("pruning.console.time.monotonic", lambda: now[0])
    with Reporter().progress("plans", 30) as step:
        for _ in range(30):
            now[0] += 1
            step.advance()
    assert capsys.readouterr().err.splitlines() == [
        "  plans: 2/30, 28 s left", "  plans: 12/30, 18 s left", "  plans: 22/30, 8 s left"
    ]  # fmt: skip
