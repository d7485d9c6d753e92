"""Choose which units go, given scores or a fitness; knows neither the metric nor the emulation behind them."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch

from pruning.plan import Unit, lowest

Rescore = Callable[[Sequence[Unit], Sequence[Unit]], Mapping[Unit, float]]
"""(removed so far, candidates) -> importance of each candidate."""

Fitness = Callable[[Sequence[Sequence[Unit]], int], Sequence[float]]
"""(plans, stage) -> cost of each plan; a later stage measures more closely and costs more."""

STAGES = 3


def rank(scores: Mapping[Unit, float], count: int, among: Sequence[Unit]) -> list[Unit]:
    """One shot: the `count` units of least importance, least first."""
    return lowest(scores, count, among)


def greedy(rescore: Rescore, count: int, among: Sequence[Unit], shortlist: int | None = None) -> list[Unit]:
    """Remove the least important unit, score the rest again, and so on; in the order of removal.

    Args:
        rescore: Importance of candidates when some units are gone.
        count: Units to remove.
        among: All units.
        shortlist: Score lazily: this many at a time, in the order of their last importance, until the best of those
            just scored is cheaper than the next one was when it was last scored. Equal to scoring all as long as a
            unit's importance does not fall when others go. None scores all.

    Source: SLEB, arXiv 2402.09025; BlockPruner, arXiv 2406.10594. Lazily: Minoux 1978.
    """
    gone: list[Unit] = []
    known = dict.fromkeys(among, -math.inf)
    for _ in range(count):
        rest = lowest(known, len(among), [unit for unit in among if unit not in gone])
        many = len(rest) if shortlist is None or not gone else shortlist
        fresh: dict[Unit, float] = {}
        while rest and (not fresh or min(fresh.values()) >= known[rest[0]]):
            asked, rest = sorted(rest[:many]), rest[many:]
            scores = rescore(gone, asked)
            fresh |= {unit: scores[unit] for unit in asked}
        known |= fresh
        gone += lowest(fresh, 1, list(fresh))
    return gone


def exchange(
    rescore: Rescore, start: Sequence[Unit], among: Sequence[Unit], rounds: int, shortlist: int | None = None
) -> list[Unit]:
    """Put the unit longest gone back and remove the least important one, again and again, until none is exchanged.

    Args:
        rescore: Importance of candidates when some units are gone.
        start: Units removed at first, such as greedy's.
        among: All units.
        rounds: Times that each of them is put back, at most.
        shortlist: Score this many units beside the one put back, those last found least important. None scores all.

    Returns:
        As many units as `start`, by position. No single exchange makes them cheaper, among those scored, unless the
        rounds ran out.

    Source: the exchange algorithm for subsets, Fedorov 1972, and the steps backward and forward of floating search,
        Pudil, Novovicova and Kittler 1994. Inferred: the shortlist.
    """
    gone, settled = list(start), 0
    known: dict[Unit, float] = {}
    for _ in range(rounds * len(gone)):
        unit = gone.pop(0)
        others = [other for other in among if other not in gone and other != unit]
        if known and shortlist is not None:
            others = lowest(known, shortlist, others)
        asked = sorted([unit, *others])
        scores = rescore(gone, asked)
        known |= {other: scores[other] for other in asked}
        best = min(asked, key=lambda other: (scores[other], other != unit, other))
        gone.append(best)
        settled = settled + 1 if best == unit else 1
        if settled == len(gone):
            break
    return sorted(gone)


def consecutive(distances: Sequence[float], count: int) -> list[Unit]:
    """The run of `count` blocks over which the stream turns least; `distances` by the run's first block.

    Source: arXiv 2403.17887.
    """
    first = min(range(len(distances)), key=lambda block: (distances[block], block))
    return [Unit(block, "block") for block in range(first, first + count)]


def evolutionary(
    fitness: Fitness, start: Sequence[Unit], among: Sequence[Unit], seed: int, generations: int, offspring: int
) -> list[Unit]:
    """One parent, mutated by level switches; children are selected in stages of rising cost.

    A switch puts one removed unit back and removes one kept unit instead, so the count stays. A child has
    min(a, b) switches, a and b uniform in 1..3. Each stage keeps a quarter of the children; the parent takes part in
    the last, so that fitness never gets worse.

    Args:
        fitness: Cost of plans, stage 0..2.
        start: First parent.
        among: All units.
        seed: Of the mutations.
        generations: Parents after the first.
        offspring: Children in a generation.

    Source: EvoPress, arXiv 2410.14649, on sublayers.
    """
    chance = random.Random(seed)
    parent = sorted(start)
    if len(parent) >= len(among):
        return parent
    for _ in range(generations):
        children = _distinct(parent, among, offspring, chance)
        for stage in range(STAGES - 1):
            costs = fitness(children, stage)
            best = sorted(range(len(children)), key=lambda i: (costs[i], i))
            children = [children[i] for i in best[: max(1, len(children) // 4)]]
        finalists = [parent, *children]
        costs = fitness(finalists, STAGES - 1)
        parent = finalists[min(range(len(finalists)), key=lambda i: (costs[i], i))]
    return parent


def _distinct(parent: list[Unit], among: Sequence[Unit], wanted: int, chance: random.Random) -> list[list[Unit]]:
    children: list[list[Unit]] = []
    for _ in range(20 * wanted):
        gone = list(parent)
        for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
            kept = [unit for unit in among if unit not in gone]
            gone[chance.randrange(len(gone))] = chance.choice(kept)
        child = sorted(gone)
        if child != parent and child not in children:
            children.append(child)
        if len(children) == wanted:
            break
    return children


def policy_gradient(
    fitness: Fitness, count: int, among: Sequence[Unit], seed: int, steps: int, samples: int, rate: float = 0.3
) -> list[Unit]:
    """Learn the probability that each unit is removed, from forwards alone; take the `count` most probable.

    Masks are Bernoulli draws whose probabilities p sum to `count`. With costs c of the masks m drawn in a step, the
    estimate of dE[c]/dp is the mean of (c - mean c of the other masks) (m - p) / (p (1 - p)); its length is set to
    `rate` and p projected back onto its sum.

    Args:
        fitness: Cost of plans; the last stage is used.
        count: Units to remove.
        among: All units.
        seed: Of the masks.
        steps: Updates of p.
        samples: Masks in a step, at least 2.
        rate: Length of the first step; it falls linearly to zero.

    Source: arXiv 2406.10576 (REINFORCE on masks with a variance-reducing baseline). Inferred: the leave-one-out
        baseline (arXiv 1903.02059), the normalised step.
    """
    if count >= len(among):
        return list(among)
    generator = torch.Generator().manual_seed(seed)
    p = torch.full((len(among),), count / len(among), dtype=torch.float64)
    for step in range(steps):
        masks = (torch.rand(samples, len(among), generator=generator, dtype=torch.float64) < p).double()
        plans = [[unit for unit, gone in zip(among, mask, strict=True) if gone] for mask in masks.tolist()]
        costs = torch.tensor(fitness(plans, STAGES - 1), dtype=torch.float64)
        advantages = (costs - costs.mean()) * samples / (samples - 1)
        gradient = (advantages[:, None] * (masks - p) / (p * (1 - p))).mean(0)
        length = gradient.norm()
        if length > 0:
            p = _project(p - rate * (1 - step / steps) * gradient / length, count)
    order = sorted(range(len(among)), key=lambda i: (-float(p[i]), i))
    return [among[i] for i in order[:count]]


def _project(p: torch.Tensor, total: int, margin: float = 0.02) -> torch.Tensor:
    """Nearest probabilities in [margin, 1 - margin] that sum to `total`, by bisection on the shift."""
    n = len(p)
    total_inside = min(max(float(total), margin * n), (1 - margin) * n)
    low, high = float(-p.max()) - 1, float(1 - p.min()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        if float((p + middle).clamp(margin, 1 - margin).sum()) < total_inside:
            low = middle
        else:
            high = middle
    return (p + high).clamp(margin, 1 - margin)
