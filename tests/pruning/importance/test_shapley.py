"""The estimators on toy games whose values are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.importance.shapley import permutation_shapley, sampled_contributions

COSTS = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


def additive(weights):
    return lambda sets: torch.tensor([sum(weights[i] for i in gone) for gone in sets], dtype=torch.float64)


def with_synergy(weights):
    """Players 0 and 1 cost 3 more when both are gone; the last player costs nothing."""
    plain = additive(weights)

    def game(sets):
        both = torch.tensor([3.0 if {0, 1} <= gone else 0.0 for gone in sets], dtype=torch.float64)
        return plain(sets) + both

    return game


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(COSTS, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_an_additive_game_gives_every_player_its_own_cost(costs, seed):
    estimate = permutation_shapley(additive(costs), len(costs), 2, seeded(seed), 0.0)
    torch.testing.assert_close(estimate.values, torch.tensor(costs, dtype=torch.float64), atol=1e-9, rtol=0)
    assert estimate.errors.max() < 1e-9


@given(COSTS, st.integers(0, 9), st.sampled_from([0.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_values_sum_to_the_whole_cost_also_when_truncated(costs, seed, tolerance):
    game = with_synergy(costs)
    players = len(costs)
    estimate = permutation_shapley(game, players, 3, seeded(seed), tolerance)
    empty, full = game([frozenset(), frozenset(range(players))]).tolist()
    assert float(estimate.values.sum()) == pytest.approx(full - empty, abs=1e-9)


def test_symmetric_players_are_equal_and_a_null_player_is_worth_nothing():
    game = with_synergy([1.0, 1.0, 2.0, 0.5, 0.0])
    estimate = permutation_shapley(game, 5, 400, seeded(), 0.0)
    assert float(estimate.values[4]) == 0.0
    assert float(estimate.values[2]) == pytest.approx(2.0)
    # One of an antithetic pair of orders has 0 before 1, so the pair gives each half of the synergy.
    assert float(estimate.values[0]) == pytest.approx(2.5)
    assert float(estimate.values[1]) == pytest.approx(2.5)


def test_truncation_asks_for_fewer_sets():
    asked = []

    def saturating(sets):
        asked.extend(sets)
        return torch.tensor([float(bool(gone)) for gone in sets], dtype=torch.float64)

    permutation_shapley(saturating, 32, 1, seeded(), 0.0)
    every = len(asked)
    asked.clear()
    permutation_shapley(saturating, 32, 1, seeded(), 0.01)
    assert len(asked) == 2 + 2 * 8
    assert every == 2 + 2 * 32


def test_the_standard_error_is_that_of_repeated_estimates():
    generator = torch.Generator().manual_seed(3)
    pairs = torch.rand(10, 10, generator=generator, dtype=torch.float64)

    def game(sets):
        rows = [sum(float(pairs[i, j]) for i in gone for j in gone) ** 1.5 for gone in sets]
        return torch.tensor(rows, dtype=torch.float64)

    estimates = [permutation_shapley(game, 10, 6, seeded(seed), 0.0) for seed in range(60)]
    spread = torch.stack([estimate.values for estimate in estimates]).std(0)
    claimed = torch.stack([estimate.errors for estimate in estimates]).mean(0)
    assert 0.7 < float((claimed / spread).mean()) < 1.3


def test_sampled_contributions_of_single_players_are_leave_one_out():
    costs = [3.0, 1.0, -2.0, 0.5]
    estimate = sampled_contributions(additive(costs), 4, 4, 1, seeded())
    # Without i: costs[i]; with i: the mean of the others.
    expected = [c - (sum(costs) - c) / 3 for c in costs]
    torch.testing.assert_close(estimate.values, torch.tensor(expected, dtype=torch.float64))


@given(st.integers(2, 15), st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_player_is_sometimes_removed_and_sometimes_kept(players, samples, depth, seed):
    estimate = sampled_contributions(additive([1.0] * players), players, samples, depth, seeded(seed))
    assert torch.isfinite(estimate.values).all()
