"""A plan of narrower FFNs: which units each loses first, what that costs, and how narrow each gets for a budget."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling
from pruning.models.loading import DenseModel
from pruning.models.sizes import shape_of, weight_bytes
from pruning.plan import Plan, Sublayer, Unit, parse_share
from pruning.recipe import Recipe
from pruning.search.selection import Judge, Selection, score
from pruning.search.widths import widths
from pruning.variants.narrow import NARROW, multiple_of
from pruning.variants.narrow_fit import Narrowing, narrowings

LEAST_SCORE = 0.1  # of the median: what a layer costs at least that lost nothing, or gained, in its trial


def excess_bytes(dense: DenseModel, recipe: Recipe) -> int:
    """Weight bytes that the recipe's budget lets go."""
    assert recipe.weight_budget is not None
    return math.ceil(weight_bytes(dense.model) * (1 - parse_share(recipe.weight_budget, "weight-budget")))


def unit_bytes(dense: DenseModel, sublayer: Sublayer) -> int:
    """Weight bytes of one unit of an FFN."""
    shape = shape_of(dense, sublayer, 0, 0)
    return shape.whole - NARROW.weight_bytes(shape.of_units(size_of(dense) - 1))


def size_of(dense: DenseModel) -> int:
    """F, units of an FFN of the dense model."""
    return int(dense.model.config.intermediate_size)


def possible(size: int) -> list[int]:
    """The widths of an FFN of `size` units, all units first."""
    multiple = multiple_of(size)
    return [size, *range((size - 1) // multiple * multiple, 0, -multiple)]


def uniform(dense: DenseModel, recipe: Recipe, blocks: Sequence[int]) -> int:
    """The one width for all these blocks that meets the budget.

    Raises:
        RecipeError: None does.
    """
    excess, size = excess_bytes(dense, recipe), size_of(dense)
    each = sum(unit_bytes(dense, Sublayer(block, "ffn")) for block in blocks)
    for units in possible(size)[1:]:
        if (size - units) * each >= excess:
            return units
    raise RecipeError(
        f"--weight-budget {recipe.weight_budget} is out of reach: FFNs of {possible(size)[-1]} units do not save it"
    )


def candidates(dense: DenseModel, recipe: Recipe, tokens: Tensor, reporter: Reporter) -> dict[Sublayer, Narrowing]:
    """The order in which every FFN that may be narrowed loses its units, and all of them at one width.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        tokens: To choose units on, int64 [n, T].
        reporter: For progress.

    Raises:
        RecipeError: The budget is out of reach.
    """
    evaluator = Evaluator(dense.model, dense.family, tokens)
    blocks = [block for block in range(len(evaluator.blocks)) if block not in recipe.keep]
    return narrowings(evaluator, blocks, uniform(dense, recipe, blocks), reporter)


def choose(
    dense: DenseModel, recipe: Recipe, found: Mapping[Sublayer, Narrowing], judges: Sequence[Judge], reporter: Reporter
) -> tuple[Selection, dict[Sublayer, Tensor]]:
    """Give every FFN the width that costs least.

    An FFN of n units is predicted to lose what its trial lost, times the share of its output that n units miss over the
    share that the trial missed: losses of one layer are small, and grow as the square of what is missed.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        found: From `candidates`.
        judges: What plans are judged by, with the trials in place.
        reporter: For progress.

    Returns:
        The FFNs that lose units, the cheapest first, with the scores of all; and the numbers of the units that each of
        them keeps, int64 [n].

    Raises:
        RecipeError: The budget is out of reach.
    """
    units = [Unit(sublayer.block, "ffn") for sublayer in found]
    scores = score(judges, units, recipe.metric, Sampling(recipe.seed, recipe.draws, len(units)), reporter)
    losses = {unit.sublayers[0]: value for unit, value in scores[""].values.items()}
    curves = predicted(found, losses)
    each = {sublayer.block: unit_bytes(dense, sublayer) for sublayer in found}
    chosen = widths(curves, each, excess_bytes(dense, recipe))
    if chosen is None:
        raise RecipeError(f"--weight-budget {recipe.weight_budget} is out of reach: FFNs alone do not save it")
    kept = {s: found[s].elimination.kept(chosen[s.block]) for s in found if s.block in chosen}
    order = sorted((Unit(sublayer.block, "ffn") for sublayer in kept), key=lambda unit: losses[unit.sublayers[0]])
    total = sum(curves[block][n] for block, n in chosen.items())
    reporter.say(f"predicted loss increase: {total:.4f} nats per token, before FFNs are fitted to each other")
    return Selection(order, scores), kept


def described(plan: Plan) -> str:
    """One line for people."""
    return "narrowing FFNs to units: " + ", ".join(f"ffn.{block} {units}" for block, units in plan.units.items())


def predicted(found: Mapping[Sublayer, Narrowing], losses: Mapping[Sublayer, float]) -> dict[int, dict[int, float]]:
    """Block -> units left -> predicted loss, in the unit of the trials' losses."""
    least = LEAST_SCORE * statistics.median(abs(loss) for loss in losses.values())
    curves: dict[int, dict[int, float]] = {}
    for sublayer, each in found.items():
        errors: Any = each.elimination.errors
        rate = max(losses[sublayer], least) / each.trial_error if each.trial_error else 0.0
        curves[sublayer.block] = {units: rate * errors[units] for units in possible(max(errors))}
    return curves
