"""Shapley value estimators over an abstract game: the maths alone.

A game takes sets of removed players and returns the cost of each, so a player's value is the cost its removal causes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Game = Callable[[Sequence[frozenset[int]]], Tensor]
"""Removed sets -> their costs, float64 [sets]."""

STEP = 8  # nested sets asked for at once: they share a prefix, and truncation can stop between two steps


@dataclass(frozen=True, slots=True)
class Estimate:
    """Values and their standard errors, float64 [players] each; the error is NaN where one sample gives none."""

    values: Tensor
    errors: Tensor


def permutation_shapley(
    game: Game, players: int, samples: int, generator: torch.Generator, tolerance: float
) -> Estimate:
    """Shapley values from random orders of removal, each followed by its reverse.

    phi_i = E over orders of [cost(before and i) - cost(before)]. Every order telescopes, so the values sum to
    cost(all removed) - cost(none removed) exactly, whatever the number of samples.

    Args:
        game: Cost of removed sets.
        players: n.
        samples: Antithetic pairs of orders.
        generator: Draws the orders.
        tolerance: Once the cost is within this share of the whole range of that of removing everybody, the rest of
            the range is divided evenly among the players left; 0 never stops early.

    Returns:
        Values, and standard errors over pairs.

    Source: Castro et al. 2009 (permutations); Mitchell et al., arXiv 2104.12199 (antithetic); Ghorbani and Zou,
        arXiv 1904.02868 (truncation). Inferred: dividing the rest evenly, which keeps the sum exact.
    """
    empty, full = game([frozenset(), frozenset(range(players))]).tolist()
    pairs = []
    for _ in range(samples):
        order = torch.randperm(players, generator=generator).tolist()
        one, other = (_marginals(game, way, empty, full, tolerance) for way in (order, order[::-1]))
        pairs.append((one + other) / 2)
    return _mean_and_error(torch.stack(pairs))


def _marginals(game: Game, order: Sequence[int], empty: float, full: float, tolerance: float) -> Tensor:
    """What each player's removal adds to the cost along one order, float64 [players]."""
    out = torch.zeros(len(order), dtype=torch.float64)
    cost = empty
    for first in range(0, len(order), STEP):
        if first and tolerance > 0 and abs(full - cost) <= tolerance * abs(full - empty):
            out[list(order[first:])] = (full - cost) / (len(order) - first)
            break
        ends = range(first + 1, min(first + STEP, len(order)) + 1)
        costs = game([frozenset(order[:end]) for end in ends]).tolist()
        for player, after in zip(order[first:], costs, strict=False):
            out[player] = after - cost
            cost = after
    return out


def sampled_contributions(game: Game, players: int, samples: int, depth: int, generator: torch.Generator) -> Estimate:
    """Mean cost of the sampled subnetworks that lack a player, minus that of those that have it.

    Args:
        game: Cost of removed sets.
        players: n.
        samples: Subnetworks drawn besides the dense one; every player is removed from some, kept in some.
        depth: Most players removed at once; sizes are uniform in 1..depth.
        generator: Draws the sets.

    Returns:
        Values, and standard errors of the difference of two means.

    Source: arXiv 2407.16286, section 3 (layer Shapley from sampled subnetworks). Inferred: the distribution of sizes,
        and drawing players in rounds so that all are removed about equally often. `depth` 1 and n samples is the
        paper's leave-one-out case.
    """
    removed = _balanced_sets(players, samples, max(1, min(depth, players - 1)), generator)
    costs = game(removed)
    absent = torch.tensor([[player in gone for player in range(players)] for gone in removed])
    values, errors = [], []
    for player in range(players):
        without, having = costs[absent[:, player]], costs[~absent[:, player]]
        values.append(without.mean() - having.mean())
        errors.append((_variance_of_mean(without) + _variance_of_mean(having)).sqrt())
    return Estimate(torch.stack(values), torch.stack(errors))


def _balanced_sets(players: int, samples: int, depth: int, generator: torch.Generator) -> list[frozenset[int]]:
    """Random sets of 1..depth players, dealt from shuffled decks until everybody was dealt and left out."""
    sets: list[frozenset[int]] = []
    deck: list[int] = []
    dealt: set[int] = set()
    left_out: set[int] = set()
    while len(sets) < samples or len(dealt) < players or len(left_out) < players:
        size = int(torch.randint(1, depth + 1, (), generator=generator))
        hand: set[int] = set()
        while len(hand) < size:
            if not deck:
                deck = torch.randperm(players, generator=generator).tolist()
            hand.add(deck.pop())
        sets.append(frozenset(hand))
        dealt |= hand
        left_out |= set(range(players)) - hand
    return sets


def _variance_of_mean(costs: Tensor) -> Tensor:
    """Of independent costs; NaN where one alone gives none."""
    return costs.var() / len(costs) if len(costs) > 1 else costs.new_tensor(float("nan"))


def _mean_and_error(rows: Tensor) -> Estimate:
    """Mean over rows [samples, players] and its standard error."""
    if len(rows) == 1:
        return Estimate(rows[0], torch.full_like(rows[0], float("nan")))
    return Estimate(rows.mean(0), rows.std(0) / len(rows) ** 0.5)
