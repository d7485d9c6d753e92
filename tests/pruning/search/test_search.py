"""Searches on costs whose best plan is known."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.plan import Unit
from pruning.search.algorithms import _project, consecutive, evolutionary, exchange, greedy, policy_gradient, rank

UNITS = [Unit(block, "attention") for block in range(8)]


def cost_of(plan, weights):
    """Weights, and each pair of neighbours costs 4 more."""
    blocks = sorted(unit.block for unit in plan)
    return sum(weights[b] for b in blocks) + 4.0 * sum(b - a == 1 for a, b in itertools.pairwise(blocks))


def fitness_of(weights, asked=None):
    def fitness(plans, stage):
        if asked is not None:
            asked.append((len(plans), stage))
        return [cost_of(plan, weights) for plan in plans]

    return fitness


WEIGHTS = [0.0, 0.1, 3.0, 0.2, 0.3, 3.0, 0.4, 3.0]
BEST = {0, 3, 6}


def test_greedy_sees_what_removals_do_to_each_other_and_rank_does_not():
    alone = {unit: WEIGHTS[unit.block] for unit in UNITS}
    assert {u.block for u in rank(alone, 3, UNITS)} == {0, 1, 3}

    def rescore(gone, rest):
        return {unit: cost_of([*gone, unit], WEIGHTS) for unit in rest}

    assert [u.block for u in greedy(rescore, 3, UNITS)] == [0, 3, 6]


@given(st.lists(st.integers(0, 5), min_size=8, max_size=8), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_lazy_greedy_chooses_what_greedy_does_where_importance_only_grows(weights, count, shortlist):
    asked = []

    def rescore(gone, rest):
        asked.append(len(rest))
        return {unit: cost_of([*gone, unit], weights) - cost_of(gone, weights) for unit in rest}

    lazily = greedy(rescore, count, UNITS, shortlist)
    scored = sum(asked)
    assert lazily == greedy(rescore, count, UNITS)
    assert scored <= sum(asked) - scored


def test_lazy_greedy_scores_few_where_units_are_apart():
    asked = []

    def rescore(gone, rest):
        asked.append(len(rest))
        return {unit: float(unit.block) for unit in rest}

    assert [unit.block for unit in greedy(rescore, 5, UNITS, 2)] == [0, 1, 2, 3, 4]
    assert asked == [8, 2, 2, 2, 2]


def test_greedy_takes_only_what_it_asked_about():
    def rescore(gone, rest):
        return {Unit(0, "ffn"): -1.0, **{unit: float(unit.block) for unit in UNITS}}

    assert [str(unit) for unit in greedy(rescore, 2, UNITS[3:])] == ["attention.3", "attention.4"]


@given(st.lists(st.integers(0, 5), min_size=8, max_size=8), st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_exchange_ends_where_no_single_exchange_is_cheaper(weights, count, seed):
    def rescore(gone, rest):
        return {unit: cost_of([*gone, unit], weights) - cost_of(gone, weights) for unit in rest}

    start = random.Random(seed).sample(UNITS, count)
    found = exchange(rescore, start, UNITS, rounds=8)
    assert len(set(found)) == count
    assert cost_of(found, weights) <= cost_of(start, weights)
    for unit, other in itertools.product(found, set(UNITS) - set(found)):
        assert cost_of(found, weights) <= cost_of([other, *(set(found) - {unit})], weights)


def test_exchange_leaves_what_greedy_is_stuck_with_and_scores_few():
    """Unit 0 is cheapest alone, and dear beside any other; greedy never lets it go."""
    asked = []

    def rescore(gone, rest):
        asked.append(len(rest))
        return {unit: sum(u.block for u in [*gone, unit]) + 9.0 * (Unit(0, "attention") in [*gone, unit]) * bool(gone)
                for unit in rest}  # fmt: skip

    stuck = greedy(rescore, 3, UNITS)
    assert [unit.block for unit in stuck] == [0, 1, 2]
    asked.clear()
    assert [unit.block for unit in exchange(rescore, stuck, UNITS, rounds=3, shortlist=2)] == [1, 2, 3]
    assert asked == [6, 3, 3]
    asked.clear()
    assert exchange(rescore, UNITS, UNITS, rounds=3) == UNITS


def test_evolution_finds_the_best_plan_and_measures_few_closely():
    asked = []
    found = evolutionary(fitness_of(WEIGHTS, asked), UNITS[:3], UNITS, seed=0, generations=15, offspring=16)
    assert {u.block for u in found} == BEST
    assert set(asked) == {(16, 0), (4, 1), (2, 2)} or {stage for _, stage in asked} == {0, 1, 2}
    assert max(n for n, stage in asked if stage == 2) <= 2


@given(st.lists(st.floats(0, 5), min_size=8, max_size=8), st.integers(1, 7), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_evolution_never_ends_worse_than_it_starts(weights, count, seed):
    start = random.Random(seed).sample(UNITS, count)
    found = evolutionary(fitness_of(weights), start, UNITS, seed, generations=3, offspring=4)
    assert len(set(found)) == count
    assert cost_of(found, weights) <= cost_of(start, weights)


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_learns_to_avoid_dear_units_and_neighbours(seed):
    found = policy_gradient(fitness_of(WEIGHTS), 3, UNITS, seed, steps=60, samples=48)
    best = min(cost_of(plan, WEIGHTS) for plan in itertools.combinations(UNITS, 3))
    assert cost_of(found, WEIGHTS) < best + 0.15  # the dearest of four good plans; chance gives 5 on average


def test_searches_are_the_same_under_a_seed():
    for _ in range(2):
        plans = [policy_gradient(fitness_of(WEIGHTS), 3, UNITS, 5, 5, 4) for _ in range(2)]
        assert plans[0] == plans[1]
        plans = [evolutionary(fitness_of(WEIGHTS), UNITS[:3], UNITS, 5, 2, 4) for _ in range(2)]
        assert plans[0] == plans[1]


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=20), st.data())
def test_projection_keeps_the_sum_and_the_order(values, data):
    total = data.draw(st.integers(1, len(values) - 1))
    p = torch.tensor(values, dtype=torch.float64)
    projected = _project(p, total)
    inside = min(max(total, 0.02 * len(values)), 0.98 * len(values))
    assert float(projected.sum()) == pytest.approx(inside, abs=1e-6)
    order = p.argsort()
    assert (projected[order].diff() >= -1e-12).all()


def test_a_run_of_blocks():
    assert consecutive([0.5, 0.2, 0.4], 4) == [Unit(b, "block") for b in (1, 2, 3, 4)]
