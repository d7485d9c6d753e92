"""KV heads that are chosen while the model is trained, by gates that start from the scores of the ordinary choice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.models.loading import DenseModel
from pruning.plan import Plan, parse_share
from pruning.recipe import Recipe
from pruning.recovery.prune_aware import Gates, Tuning
from pruning.recovery.training import Lessons
from pruning.recovery.training_state import Carried
from pruning.search.heads import Head, HeadPlan
from pruning.windows.plans import Choice
from pruning.workdir import healing_states

LEAST_WORTH = 0.01  # of the mean: so much more a head counts, so that training can make something of any


def gates_of(choice: Choice, plan: HeadPlan, budget: float) -> tuple[Sequence[Sequence[Head]], Gates]:
    """A gate for every KV head that may stay full, or for every layer where the plan takes whole ones: whose, and it.

    Args:
        choice: Scores of all heads.
        plan: The ordinary choice; its windows keep their sizes.
        budget: Share of the KV cache.
    """
    free = sorted(choice.free)
    heads: Sequence[Sequence[Head]] = [[each] for each in free]
    if choice.takes_layers(plan):
        heads = [[each for each in free if each[0] == block] for block in choice.blocks]
    worth, cost = _worth(choice, plan), {block: choice.cost_of_a_head(block, plan) for block in choice.blocks}
    values = torch.tensor([sum(float(worth[head]) for head in members) for members in heads], dtype=torch.float64)
    costs = torch.tensor([sum(cost[block] for block, _ in members) for members in heads], dtype=torch.float64)
    left = (budget - choice.share(all_limited(choice, plan))) * choice.total
    return heads, Gates((values / costs).log(), costs, left)


def all_limited(choice: Choice, plan: HeadPlan) -> HeadPlan:
    """The plan with no free head full."""
    return HeadPlan(choice.kept, plan.sizes)


def _worth(choice: Choice, plan: HeadPlan) -> Tensor:
    """What limiting each head to the plan's window costs, [L, K] float64, and a little."""
    table = torch.zeros_like(choice.usual.heads)
    for block, head in choice.free:
        table[block, head] = choice.scores[plan.size(block)].heads[block, head]
    return table + (LEAST_WORTH * float(table.sum()) / len(choice.free) or 1.0)


def learned(choice: Choice, plan: HeadPlan, budget: float, heads: Sequence[Sequence[Head]], change: Tensor) -> HeadPlan:
    """The hard plan: the ordinary choice, with what each head is worth changed by the factors that training found.

    Args:
        choice: Scores of all heads.
        plan: The ordinary choice; it is returned where nothing was trained.
        budget: Share of the KV cache.
        heads: Those of each gate, from `gates_of`.
        change: Of the logarithm of what each gate is worth, float64 [n].
    """
    if not change.any():
        return plan
    worth = _worth(choice, plan)
    for members, factor in zip(heads, change.exp().tolist(), strict=True):
        for head in members:
            worth[head] *= factor
    scores = {size: replace(of_size, heads=worth) for size, of_size in choice.scores.items()}
    return replace(choice, scores=scores).again(plan, budget)


def tuned(
    dense: DenseModel, recipe: Recipe, choice: Choice, plan: HeadPlan, limited: Plan, lessons: Lessons, output: Path,
    reporter: Reporter,
) -> tuple[HeadPlan, Carried | None]:  # fmt: skip
    """Train gates and weights together for the first part of the budget in steps or time.

    What the plan may keep of the KV cache is what the recipe asks for, or what the ordinary choice keeps.

    Args:
        dense: The model, left as it is.
        recipe: Resolved.
        choice: Scores of all heads.
        plan: The ordinary choice.
        limited: The plan with all free heads limited.
        lessons: What to train on, and how.
        output: Of the run, which its states belong to.
        reporter: For progress.

    Returns:
        The hard plan, and what was trained of the weights; None: nothing.
    """
    budget = choice.share(plan) if recipe.kv_budget is None else parse_share(recipe.kv_budget, "kv-budget")
    heads, gates = gates_of(choice, plan, budget)
    tuning = Tuning(dense.model, dense.family, lessons, reporter, healing_states(output)[0])
    change, carried = tuning.heads(limited, choice.limits.by(all_limited(choice, plan)).scored, gates, heads)
    found = learned(choice, plan, budget, heads, change)
    reporter.say(f"gates: {len(plan.full - found.full)} of {len(plan.full)} full KV heads gave way to others")
    return found, carried if carried.step else None
