"""A plan of narrower FFNs: which units each loses first, what that costs, and how narrow each gets for a budget."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.finite import check_numbers
from pruning.forward.evaluator import Evaluator
from pruning.forward.sensitivity import sensitivities
from pruning.importance import Scores
from pruning.models.loading import DenseModel
from pruning.models.sizes import shape_of, weight_bytes
from pruning.plan import Plan, Sublayer, Unit, parse_share
from pruning.recipe import Recipe
from pruning.recovery.emulation import Recovery
from pruning.recovery.kept_units import narrower, whole_projections
from pruning.recovery.prune_aware import Gates, Tuning
from pruning.recovery.training import Lessons
from pruning.recovery.training_state import Carried
from pruning.search.selection import Selection
from pruning.search.widths import widths
from pruning.variants.narrow import NARROW, multiple_of
from pruning.variants.narrow_fit import GRADIENT_TOKENS, Elimination, narrowings, output_of
from pruning.workdir import healing_states

SCORED = "predicted loss of narrowing"
"""What `pruning.json` calls the costs that FFNs are compared by: nats per token at the one width for all."""

LEAST_WORTH = 0.01  # of the mean: so much more a group of units counts, so that training can make something of any


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


def orders(evaluator: Evaluator, blocks: Iterable[int], seed: int, reporter: Reporter) -> dict[Sublayer, Elimination]:
    """The order in which FFNs lose their units, and what that is predicted to cost.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        blocks: Whose FFNs may be narrowed.
        seed: Of the words that gradients are taken for.
        reporter: For progress.
    """
    projections = {block: output_of(evaluator, block) for block in blocks}
    felt = sensitivities(evaluator, projections, GRADIENT_TOKENS, seed, reporter)
    return narrowings(evaluator, felt, reporter)


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
    return orders(evaluator, blocks, recipe.seed, reporter)


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


def groups_of(found: Mapping[Sublayer, Elimination]) -> dict[int, list[Tensor]]:
    """Block -> the units between each of its widths and the next, those that go first first; the last width stays."""
    groups = {}
    for sublayer, each in found.items():
        gone = [len(each.order) - width for width in possible(len(each.order))]
        groups[sublayer.block] = [each.order[first:last] for first, last in pairwise(gone)]
    return groups


def gates_of(dense: DenseModel, recipe: Recipe, found: Mapping[Sublayer, Elimination]) -> Gates:
    """A gate for every group of `groups_of`: what it is worth is what the prediction adds where it goes, too."""
    worth, costs = [], []
    for sublayer, each in found.items():
        added = [each.loss(less) - each.loss(more) for more, less in pairwise(possible(len(each.order)))]
        worth += added
        costs += [len(units) * unit_bytes(dense, sublayer) for units in groups_of({sublayer: each})[sublayer.block]]
    values, bytes_of = torch.tensor(worth, dtype=torch.float64).clamp_min(0), torch.tensor(costs, dtype=torch.float64)
    values += LEAST_WORTH * float(values.mean()) or 1.0
    usual = float(bytes_of.mean())
    left = (float(bytes_of.sum()) - excess_bytes(dense, recipe)) / usual
    return Gates((values / (bytes_of / usual)).log(), bytes_of / usual, left)


def learned(
    dense: DenseModel, recipe: Recipe, found: Mapping[Sublayer, Elimination], gates: Gates, change: Tensor
) -> dict[Sublayer, Tensor]:
    """The units that each narrower FFN keeps, int64 [n]: by what groups are worth times the factors of training.

    Groups go in the order of what they are worth then, those that are no whole multiple first.
    """
    size = size_of(dense)
    worth = (gates.scores + change).exp() * gates.costs
    curves: dict[int, dict[int, float]] = {}
    orders_of: dict[int, list[Tensor]] = {}
    number = 0
    for block, groups in groups_of(found).items():
        own = worth[number : number + len(groups)].tolist()
        number += len(groups)
        order = sorted(range(len(groups)), key=lambda group: (len(groups[group]) == len(groups[-1]), own[group]))
        orders_of[block] = [groups[group] for group in order]
        costs = accumulate((own[group] for group in order), initial=0.0)
        curves[block] = dict(zip(possible(size), costs, strict=True))
    each = {sublayer.block: unit_bytes(dense, sublayer) for sublayer in found}
    chosen = widths(curves, each, excess_bytes(dense, recipe))
    assert chosen is not None  # the ordinary choice was within the budget
    kept = {}
    for block, width in chosen.items():
        stay = torch.ones(size, dtype=torch.bool)
        stay[torch.cat(orders_of[block])[: size - width]] = False
        kept[Sublayer(block, "ffn")] = stay.nonzero().flatten()
    return kept


def tuned(
    dense: DenseModel, recipe: Recipe, found: Mapping[Sublayer, Elimination], prepared: Mapping[Sublayer, Tensor],
    recovery: Recovery, lessons: Lessons, output: Path, reporter: Reporter,
) -> tuple[dict[Sublayer, Tensor], Recovery, Carried | None]:  # fmt: skip
    """Train gates and weights together for the first part of the budget in steps or time, from the ordinary choice.

    Output projections begin as they are refitted for the ordinary choice, with the dense model's columns of units that
    went. So where gates end as they began, nothing is different.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        found: From `candidates`.
        prepared: The units that narrower FFNs keep by the ordinary choice.
        recovery: With the ordinary choice's FFNs.
        lessons: What to train on, and how.
        output: Of the run, which its states belong to.
        reporter: For progress.

    Returns:
        The units that narrower FFNs keep, these FFNs untrained, and what was trained of the weights; None: nothing.
    """
    gates, refitted = gates_of(dense, recipe, found), whole_projections(dense.model, dense.family, recovery, prepared)
    tuning = Tuning(dense.model, dense.family, lessons, reporter, healing_states(output)[0])
    begun = Recovery({}, {**recovery.weights, **refitted})
    change, carried = tuning.units(begun, gates, groups_of(found))
    if not change.any():
        return dict(prepared), recovery, None
    kept = learned(dense, recipe, found, gates, change)
    before, after = ({(s.block, n) for s, each in some.items() for n in each.tolist()} for some in (prepared, kept))
    reporter.say(f"gates: {len(after - before)} units stay that the ordinary choice lets go")
    emulations, carried = narrower(dense.model, dense.family, refitted, kept, carried)
    return kept, Recovery(emulations, recovery.weights), carried
