"""The cheapest choice of one option for each layer within a capacity: a knapsack of several choices, solved exactly."""

from collections.abc import Sequence

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from pruning.forward import parallel

Option = tuple[float, float]
"""Cost and weight."""

SECONDS = 60.0  # of the solver; models of a hundred layers take under one
TIE = 1e-9  # of the cost of all, that a unit of weight counts: of equals, what keeps less is taken


def cheapest(items: Sequence[Sequence[Option]], capacity: float) -> list[int] | None:
    """One option of each item, at the least cost in all whose weight in all stays within the capacity.

    Under `torchrun` the first process solves for all, so that the solver's limit of time parts no two of them.

    Args:
        items: Options of each, at least one.
        capacity: In the unit of the weights.

    Returns:
        The number of each item's option; None where even the lightest weigh more.

    Source: an integer programme for the choice by layer, as Puzzle, arXiv 2411.19146; solved by HiGHS.
    """
    if sum(min(weight for _, weight in options) for options in items) > capacity * (1 + 1e-12):
        return None
    return parallel.of_first(lambda: _solved(items, capacity))


def _solved(items: Sequence[Sequence[Option]], capacity: float) -> list[int]:
    counts = [len(options) for options in items]
    costs = numpy.array([cost for options in items for cost, _ in options])
    weights = numpy.array([weight for options in items for _, weight in options])
    firsts = numpy.cumsum([0, *counts])
    rows = numpy.repeat(numpy.arange(len(items)), counts)
    one_each = csr_matrix((numpy.ones(len(costs)), (rows, numpy.arange(len(costs)))))
    scale = costs.max() or 1.0
    found = milp(
        costs / scale + TIE * weights,
        integrality=numpy.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights[None], -numpy.inf, capacity * (1 + 1e-12)),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
    )
    if found.x is None:
        raise RuntimeError(f"the integer programme of {len(items)} layers has no answer: {found.message}")
    return [int(found.x[first : first + count].argmax()) for first, count in zip(firsts[:-1], counts, strict=True)]
