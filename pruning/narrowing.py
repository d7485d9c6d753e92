"""A plan of narrower FFNs: which units each loses first, what that costs, and how narrow each gets for a budget."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.finite import check_numbers
from pruning.forward.evaluator import Evaluator
from pruning.importance import Scores
from pruning.models.loading import DenseModel
from pruning.models.sizes import shape_of, weight_bytes
from pruning.plan import Plan, Sublayer, Unit, parse_share
from pruning.recipe import Recipe
from pruning.search.selection import Selection
from pruning.search.widths import widths
from pruning.variants.narrow import NARROW, multiple_of
from pruning.variants.narrow_fit import Elimination, narrowings


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


def candidates(dense: DenseModel, recipe: Recipe, tokens: Tensor, reporter: Reporter) -> dict[Sublayer, Elimination]:
    """The order in which every FFN that may be narrowed loses its units, and what that is predicted to cost.

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
    uniform(dense, recipe, blocks)
    return narrowings(evaluator, blocks, recipe.seed, reporter)


def choose(
    dense: DenseModel, recipe: Recipe, found: Mapping[Sublayer, Elimination], reporter: Reporter
) -> tuple[Selection, dict[Sublayer, Tensor]]:
    """Give every FFN the width that costs least by the prediction of its elimination.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        found: From `candidates`.
        reporter: For progress.

    Returns:
        The FFNs that lose units, the cheapest first, with what each would cost at the one width that meets the budget;
        and the numbers of the units that each of them keeps, int64 [n].

    Raises:
        RecipeError: The budget is out of reach.
    """
    curves = {sublayer.block: {n: each.loss(n) for n in possible(len(each.order))} for sublayer, each in found.items()}
    each = {sublayer.block: unit_bytes(dense, sublayer) for sublayer in found}
    chosen = widths(curves, each, excess_bytes(dense, recipe))
    if chosen is None:
        raise RecipeError(f"--weight-budget {recipe.weight_budget} is out of reach: FFNs alone do not save it")
    one = uniform(dense, recipe, list(curves))
    costs = {Unit(block, "ffn"): curve[one] for block, curve in curves.items()}
    check_numbers({str(unit): cost for unit, cost in costs.items()}, "the predicted cost")
    kept = {s: found[s].kept(chosen[s.block]) for s in found if s.block in chosen}
    order = sorted((Unit(sublayer.block, "ffn") for sublayer in kept), key=costs.__getitem__)
    total, even = sum(curves[block][n] for block, n in chosen.items()), sum(costs.values())
    reporter.say(
        f"predicted loss increase: {total:.4f} nats per token ({even:.4f} with {one} units in every FFN), "
        "each FFN alone"
    )
    return Selection(order, {"": Scores(costs)}), kept


def described(plan: Plan) -> str:
    """One line for people."""
    return "narrowing FFNs to units: " + ", ".join(f"ffn.{block} {units}" for block, units in plan.units.items())
