"""What becomes of every KV head: a plan for any budget, or the smallest that loses little, from one scoring."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pruning.budget import window_sizes
from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.importance import Scores
from pruning.models.loading import DenseModel
from pruning.plan import Sublayer, Unit, parse_share, window_part
from pruning.recipe import Recipe
from pruning.search import exchange, heads
from pruning.search.knapsack import cheapest
from pruning.search.selection import Judge, Selection
from pruning.windows import Limits, Measured

WHOLE_LAYERS_MAY_LOSE = 1.1  # of what single heads lose
BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tried where a loss is allowed
LIKELY_BUDGET = 0.3  # tried first
LOSS_INCREASE = 0.008  # nats per token where nothing else is asked for: one percent, less a row's standard error


@dataclass(frozen=True, slots=True)
class Choice:
    """Scores of all KV heads at all sizes of windows, from which a plan for any budget follows.

    Attributes:
        scores: Size, as a share of the usual window -> what limiting each head to it costs.
        limits: Every layer that may be limited, limited to the usual window.
        free: Heads that may be limited; the others were before.
        kept: Heads of layers that stay as they are.
        window: The usual one, positions.
        context: L, tokens of a request.
        by: "head", or "auto": whole layers where they cost little more.
        sizes: Share of the KV cache -> sizes that a plan within it may have.
        ranks: Tensor-parallel ranks that have as many full heads of a layer each.
    """

    scores: Mapping[float, heads.HeadScores]
    limits: Limits
    free: heads.Full
    kept: heads.Full
    window: int
    context: int
    by: str
    sizes: Callable[[float], tuple[float, ...]]
    ranks: int = 1

    @classmethod
    def of(
        cls, dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, reporter: Reporter,
        *, share: float | None = None,
    ) -> "Choice":  # fmt: skip
        """Score all heads, at the sizes of windows that plans within `share`, or what the recipe asks for, may have."""
        assert recipe.window is not None
        assert recipe.context is not None
        sizes = window_sizes(recipe, share)
        scores = heads.score(judges, found.scored, recipe.draws, reporter, sizes=sizes)
        each = range(scores[1.0].heads.shape[1])
        whole = [block for block in dense.limitable if block in recipe.keep]
        free = {block: tuple(each) for block in dense.limitable if block not in whole}
        free |= {sublayer.block: found.served[sublayer].full for sublayer in dense.limits}
        return cls(
            scores, found, frozenset((block, head) for block, some in free.items() for head in some),
            frozenset((block, head) for block in whole for head in each), recipe.window, recipe.context,
            "head" if dense.limits else recipe.window_by, partial(window_sizes, recipe),
            min(recipe.tensor_parallel, len(each)),
        )  # fmt: skip

    @property
    def left(self) -> float:
        """Share of its cache that a head with the usual window keeps."""
        return self.window / self.context

    @property
    def usual(self) -> heads.HeadScores:
        """Scores at the usual window."""
        return self.scores[1.0]

    @property
    def blocks(self) -> list[int]:
        """Blocks of the free heads."""
        return sorted({block for block, _ in self.free})

    @property
    def each(self) -> int:
        """KV heads of a layer."""
        return int(self.usual.heads.shape[1])

    @property
    def total(self) -> int:
        """KV heads of all layers that may be limited or stay."""
        return len(self.limits.served) * self.each

    @property
    def smallest(self) -> heads.HeadPlan:
        """Everything limited, to the smallest windows."""
        size = min(self.scores)
        alone = [block for block in self.blocks if sum(each == block for each, _ in self.free) == self.each]
        return heads.HeadPlan(self.kept, tuple((block, size) for block in alone if size != 1))

    def plan(self, budget: float) -> heads.HeadPlan:
        """The heads that keep every token, and the windows of the others, within a share of the KV cache.

        Every head more that is split off costs time, so whole layers are taken where by first order they lose little.

        Raises:
            RecipeError: The smallest windows take more.
        """
        single = self._within(budget, whole=False)
        if self.by == "head":
            return single
        layers = self._within(budget, whole=True)
        return layers if self.predicted(layers) <= WHOLE_LAYERS_MAY_LOSE * self.predicted(single) else single

    def again(self, plan: heads.HeadPlan, budget: float) -> heads.HeadPlan:
        """The best plan within a budget whose windows have the sizes of `plan`, of whole layers where that is."""
        return self._within(budget, whole=self.takes_layers(plan), like=plan)

    def takes_layers(self, plan: heads.HeadPlan) -> bool:
        """Whether a plan keeps all free heads of a layer or none, and may do so."""
        full = Counter(block for block, _ in plan.full & self.free)
        return self.by != "head" and all(full[block] in (0, self.each) for block in self.blocks)

    def _within(self, budget: float, *, whole: bool, like: heads.HeadPlan | None = None) -> heads.HeadPlan:
        of_block = {block: [head for each, head in sorted(self.free) if each == block] for block in self.blocks}
        scores = {size: self.scores[size] for size in self.sizes(budget) if size in self.scores}
        options = {
            block: heads.options(
                scores if like is None else {like.size(block): self.scores[like.size(block)]},
                block, free, self.ranks, whole=whole,
            )
            for block, free in of_block.items()
        }  # fmt: skip

        items = [
            [(cost, self._kept(block, size, len(full))) for cost, size, full in some] for block, some in options.items()
        ]
        others = [sublayer.block for sublayer in self.limits.served if sublayer.block not in options]
        fixed = sum(self._kept(block, 1.0, sum(each == block for each, _ in self.kept)) for block in others)
        chosen = cheapest(items, budget * self.total - fixed)
        if chosen is None:
            raise RecipeError(
                f"{budget:.1%} of the KV cache is out of reach: {self.share(self.smallest):.1%} stay with every layer "
                "limited; give a smaller --window"
            )
        taken = {block: options[block][number] for block, number in zip(options, chosen, strict=True)}
        full = frozenset((block, head) for block, (_, _, some) in taken.items() for head in some)
        sizes = [(block, size) for block, (_, size, some) in taken.items() if size != 1 and len(some) < self.each]
        return heads.HeadPlan(self.kept | full, tuple(sizes))

    def predicted(self, plan: heads.HeadPlan) -> float:
        """What a plan costs by first order, nats/token."""
        return sum(
            float(self.scores[plan.size(block)].heads[block, head]) for block, head in sorted(self.free - plan.full)
        )

    def first_order(self, plan: heads.HeadPlan) -> float:
        """What a plan costs on the text alone by first order, nats/token."""
        text = {size: next(iter(of_size.by_judge.values())).clamp_min(0) for size, of_size in self.scores.items()}
        return sum(float(text[plan.size(block)][block, head]) for block, head in sorted(self.free - plan.full))

    def share(self, plan: heads.HeadPlan) -> float:
        """Share of the KV cache that a plan keeps."""
        blocks = [sublayer.block for sublayer in self.limits.served]
        full = Counter(block for block, _ in plan.full)
        return sum(self._kept(block, plan.size(block), full[block]) for block in blocks) / self.total

    def cost_of_a_head(self, block: int, plan: heads.HeadPlan) -> float:
        """What a full head keeps more than a limited one of a plan, in the cache of a head that keeps every token."""
        return self._kept(block, plan.size(block), 1) - self._kept(block, plan.size(block), 0)

    def _kept(self, block: int, size: float, full: int) -> float:
        """Cache of a layer with so many full heads, in that of one head that keeps every token."""
        window = window_part(self.limits.served[Sublayer(block, "attention")].size, size)
        return full + (self.each - full) * window / self.context

    def selection(self, plan: heads.HeadPlan) -> tuple[Selection, Limits]:
        """The limited layers, least first, with the scores of all; and their limits."""
        limits = self.limits.by(plan)
        layers = {Unit(block, "attention"): float(self.usual.layers[block]) for block in self.blocks}
        chosen = [unit for unit in layers if unit.sublayers[0] in limits.served]
        return Selection(sorted(chosen, key=lambda unit: layers[unit]), {"": Scores(layers)}), limits


def choose(
    dense: DenseModel, recipe: Recipe, judges: Sequence[Judge], found: Limits, measured: Measured, reporter: Reporter
) -> tuple[Choice, heads.HeadPlan]:
    """Which KV heads keep every token: within the budget, or as few as the loss that is allowed lets.

    Returns:
        The scores of all heads, and the plan.

    Raises:
        RecipeError: No plan stays within the loss.
    """
    choice = Choice.of(dense, recipe, judges, found, reporter)
    if recipe.kv_budget is not None:
        plan = choice.plan(parse_share(recipe.kv_budget, "kv-budget"))
    else:
        plan = smallest(choice, recipe.max_loss_increase or LOSS_INCREASE, measured, reporter)
    if recipe.search == "exchange":
        plan = exchanged(choice, plan, judges, reporter)
    return choice, plan


def exchanged(choice: Choice, plan: heads.HeadPlan, judges: Sequence[Judge], reporter: Reporter) -> heads.HeadPlan:
    """The plan after exchanges of single heads; windows keep the sizes that they have."""
    trial = exchange.Trial(judges, heads.sized(choice.limits.scored, plan), reporter)
    return replace(plan, full=exchange.exchange(trial, plan.full, choice.usual, choice.free))


def smallest(choice: Choice, bound: float, measured: Measured, reporter: Reporter) -> heads.HeadPlan:
    """The plan with the smallest KV cache that is as good as `bound` asks; from a likely budget, one step at a time.

    Raises:
        RecipeError: No plan is.
    """
    shares = [share for share in BUDGETS if share >= choice.share(choice.smallest)]

    def good(number: int) -> bool:
        reporter.say(f"{shares[number]:.0%} of the KV cache:")
        return measured.as_good(choice.limits.by(choice.plan(shares[number])).served, bound)

    at = min(range(len(shares)), key=lambda number: abs(shares[number] - LIKELY_BUDGET))
    if good(at):
        while at > 0 and good(at - 1):
            at -= 1
    else:
        at = next((number for number in range(at + 1, len(shares)) if good(number)), len(shares))
    if at == len(shares):
        raise RecipeError(f"--max-loss-increase {bound} is out of reach: {shares[-1]:.0%} of the KV cache costs more")
    return choice.plan(shares[at])
