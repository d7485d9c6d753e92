"""Which KV heads keep every token: a plan for any budget, or the smallest that loses little, from one scoring."""

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.importance import Scores
from pruning.models.loading import DenseModel
from pruning.plan import Unit, layers_within, parse_share
from pruning.recipe import Recipe
from pruning.search import heads
from pruning.search.selection import Judge, Selection
from pruning.windows import Limits, Measured

WHOLE_LAYERS_MAY_LOSE = 1.1  # of what single heads lose
BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried where a loss is allowed
LIKELY_BUDGET = 0.3  # tried first
LOSS_INCREASE = 0.01  # nats per token, allowed where nothing else is asked for


@dataclass(frozen=True, slots=True)
class Choice:
    """Scores of all KV heads, from which a plan for any budget follows.

    Attributes:
        scores: What limiting each head costs.
        limits: Every layer that may be limited, limited.
        free: Heads that may be limited; the others were before.
        kept: Heads of layers that stay as they are.
        left: Share of its cache that a limited head keeps.
        by: "head", or "auto": whole layers where they cost little more.
        ranks: Tensor-parallel ranks that have as many full heads of a layer each.
    """

    scores: heads.HeadScores
    limits: Limits
    free: heads.Full
    kept: heads.Full
    left: float
    by: str
    ranks: int = 1

    @classmethod
    def of(
        cls, dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, reporter: Reporter
    ) -> "Choice":
        """Score all heads."""
        assert recipe.window is not None
        assert recipe.context is not None
        scores = heads.score(judges, found.scored, recipe.draws, reporter)
        each = range(scores.heads.shape[1])
        whole = [block for block in dense.limitable if block in recipe.keep]
        free = {block: tuple(each) for block in dense.limitable if block not in whole}
        free |= {sublayer.block: found.served[sublayer].full for sublayer in dense.limits}
        return cls(
            scores, found, frozenset((block, head) for block, some in free.items() for head in some),
            frozenset((block, head) for block in whole for head in each), recipe.window / recipe.context,
            "head" if dense.limits else recipe.window_by, min(recipe.tensor_parallel, len(each)),
        )  # fmt: skip

    @property
    def blocks(self) -> list[int]:
        """Blocks of the free heads."""
        return sorted({block for block, _ in self.free})

    @property
    def total(self) -> int:
        """KV heads of all layers that may be limited or stay."""
        return len(self.limits.served) * self.scores.heads.shape[1]

    def plan(self, budget: float) -> heads.Full:
        """The heads that keep every token within a share of the KV cache: single ones, or those of whole layers.

        Every head more that is split off costs time, so whole layers are taken where by first order they lose little.
        """
        full = max(0, self.total - layers_within(budget, self.total, self.left) - len(self.kept))
        single = self.kept | heads.best_heads(self.scores, self.free, full, self.ranks)
        if self.by == "head":
            return single
        layers = self.kept | heads.best_layers(self.scores, self.blocks, full // self.scores.heads.shape[1])
        return layers if self.predicted(layers) <= WHOLE_LAYERS_MAY_LOSE * self.predicted(single) else single

    def predicted(self, plan: heads.Full) -> float:
        """What a plan costs by first order, nats/token."""
        return sum(float(self.scores.heads[each]) for each in sorted(self.free - plan))

    def first_order(self, plan: heads.Full) -> float:
        """What a plan costs on the text alone by first order, nats/token."""
        text = next(iter(self.scores.by_judge.values())).clamp_min(0)
        return sum(float(text[each]) for each in sorted(self.free - plan))

    def share(self, plan: heads.Full) -> float:
        """Share of the KV cache that a plan keeps."""
        return (len(plan) + (self.total - len(plan)) * self.left) / self.total

    def selection(self, plan: heads.Full) -> tuple[Selection, Limits]:
        """The limited layers, least first, with the scores of all; and their limits."""
        limits = self.limits.but_for(plan)
        layers = {Unit(block, "attention"): float(self.scores.layers[block]) for block in self.blocks}
        chosen = [unit for unit in layers if unit.sublayers[0] in limits.served]
        return Selection(sorted(chosen, key=lambda unit: layers[unit]), {"": Scores(layers)}), limits


def choose(
    dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, measured: Measured, reporter: Reporter
) -> tuple[Selection, Limits]:
    """Which KV heads keep every token: within the budget, or as few as the loss that is allowed lets.

    Returns:
        The limited layers and the scores of all, and the limits of the plan.

    Raises:
        RecipeError: No plan stays within the loss.
    """
    choice = Choice.of(dense, recipe, judges, found, reporter)
    if recipe.kv_budget is not None:
        plan = choice.plan(parse_share(recipe.kv_budget, "kv-budget"))
    else:
        plan = smallest(choice, recipe.max_loss_increase or LOSS_INCREASE, measured, reporter)
    if recipe.search == "exchange":
        plan = heads.exchange(heads.Trial(judges, found.scored, reporter), plan, choice.scores, choice.free)
    return choice.selection(plan)


def smallest(choice: Choice, bound: float, measured: Measured, reporter: Reporter) -> heads.Full:
    """The plan with the smallest KV cache that is as good as `bound` asks; from a likely budget, one step at a time.

    Raises:
        RecipeError: No plan is.
    """
    shares = [share for share in BUDGETS if share > choice.left]

    def good(number: int) -> bool:
        reporter.say(f"{shares[number]:.0%} of the KV cache:")
        return measured.as_good(choice.limits.but_for(choice.plan(shares[number])).served, bound)

    at = min(range(len(shares)), key=lambda number: abs(shares[number] - LIKELY_BUDGET))
    if good(at):
        while at > 0 and good(at - 1):
            at -= 1
    else:
        at = next((number for number in range(at + 1, len(shares)) if good(number)), len(shares))
    if at == len(shares):
        raise RecipeError(f"--max-loss-increase {bound} is out of reach: {shares[-1]:.0%} of the KV cache costs more")
    return choice.plan(shares[at])
