"""Which KV heads keep every token when the others are limited: scored by gates, tried as plans, improved by exchange.

What a model fetches from far away sits in single KV heads. A plan names the heads that stay full; a layer of which all
stay is left as it is, one of which none stays is limited whole.

Source: retrieval heads, arXiv 2404.15574; gates by head, arXiv 2410.10819. There gates are trained, here their gradient
    is read off.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.finite import check_numbers
from pruning.forward import parallel
from pruning.forward.gates import each_head_gradients
from pruning.forward.streams import describe
from pruning.plan import Sublayer
from pruning.search.selection import Judge, weights_by_share
from pruning.variants.window import Window

Head = tuple[int, int]
"""Block and KV head."""

Full = frozenset[Head]
"""The heads that keep every token."""

Limits = Mapping[Sublayer, Window]

REACH = 0.5  # of the way from limited to full that scores are taken on
SHORTLIST = 6  # heads outside of a plan that exchange tries at a time, and heads inside that it tries to do without
ROUNDS = 4  # exchanges, at most


@dataclass(frozen=True, slots=True)
class HeadScores:
    """What limiting each KV head costs, first order, in nats/token of the first judge.

    Attributes:
        heads: float64 [L, K], the judges' sum as `weigh` makes it; 0 where nothing is limited.
        layers: The same of whole layers [L].
        by_judge: Judge -> [L, K], as they are.
    """

    heads: Tensor
    layers: Tensor
    by_judge: Mapping[str, Tensor]


def score(
    judges: Sequence[Judge], limits: Limits, samples: int, reporter: Reporter, reach: float = REACH
) -> HeadScores:
    """Score all heads at once: minus the gradient of the loss by a gate on each, between limited (0) and full (1).

    All gates go together from `reach` to 0; the integral on the way is a Gauss-Legendre sum of `samples` points, so
    that the scores of all heads sum to what this way costs. Budgets are small, so the half of the way is taken that
    is near their plans: on WikiText it chose better than the whole way (docs/decisions/windows.md).

    Source: Aumann and Shapley, Values of Non-Atomic Games, 1974; integrated gradients, arXiv 1703.01365.
    """
    nodes, weights = numpy.polynomial.legendre.leggauss(samples)
    gates = [reach * (1 - float(node)) / 2 for node in nodes]
    found: dict[str, Tensor] = {}
    evaluators = [judge.evaluator.view([], limits) for judge in judges]
    described = describe(limits)
    steps = samples * sum(len(evaluator.mine()) for evaluator in evaluators)
    with reporter.progress("gates by head", steps) as step:
        for judge, evaluator in zip(judges, evaluators, strict=True):
            key = ["heads", evaluator.text, described, samples, reach]
            known = evaluator.journal.recall(key)
            if parallel.everywhere(known is not None):
                found[judge.name] = torch.tensor(known, dtype=torch.float64)
                continue
            config = evaluator.model.config
            shape = len(evaluator.blocks), int(config.num_key_value_heads)
            table = torch.zeros(evaluator.windows, *shape, dtype=torch.float64)
            for gate, weight in zip(gates, weights, strict=True):
                for number, part in each_head_gradients(evaluator, torch.full(shape, gate)):
                    table[evaluator.span(number)] -= part * float(weight) / 2 * reach
                    step.advance()
            found[judge.name] = parallel.gather(table).mean(0)
            check_numbers(_named(found[judge.name]), f"gates by head on {judge.name}")
            evaluator.journal.keep(key, found[judge.name].tolist())
    tables = [found[judge.name] for judge in judges]
    layers = [table.sum(1) for table in tables]
    return HeadScores(weigh(judges, tables, _positive(tables)), weigh(judges, layers, _positive(layers)), found)


def _positive(tables: Sequence[Tensor]) -> list[float]:
    return [float(table.clamp_min(0).sum()) for table in tables]


def weigh(judges: Sequence[Judge], costs: Sequence[Tensor], everything: Sequence[float]) -> Tensor:
    """One cost from the judges' costs, each counted where it is positive, by its share; nats/token of the first.

    Args:
        judges: The first is the text.
        costs: Of each judge, any shape, nats/token.
        everything: What limiting everything costs each judge.
    """
    weights = weights_by_share(judges, everything)
    return torch.stack([weight * cost.clamp_min(0) for weight, cost in zip(weights, costs, strict=True)]).sum(0)


def _named(table: Tensor) -> dict[str, float]:
    return {
        f"attention.{block} head {head}": value
        for block, row in enumerate(table.tolist())
        for head, value in enumerate(row)
    }


def best_heads(scores: HeadScores, free: Collection[Head], count: int, ranks: int = 1) -> Full:
    """At most `count` heads of `free` that cost most to limit; ties by position.

    Args:
        scores: Of all heads.
        free: Those to choose from.
        count: How many.
        ranks: Tensor-parallel ranks, each of which is to have as many full heads of a layer as the others. Heads are
            then taken together, one of each rank.
    """
    each = scores.heads.shape[1]
    bundles: list[list[Head]] = []
    for block in sorted({block for block, _ in free}):
        own = _ranked(scores, [head for head in free if head[0] == block])
        of_ranks = [[head for head in own if head[1] * ranks // each == rank] for rank in range(ranks)]
        bundles += [list(bundle) for bundle in zip(*of_ranks, strict=False)]
    bundles.sort(key=lambda bundle: (-sum(float(scores.heads[head]) for head in bundle), bundle))
    return frozenset(head for bundle in bundles[: count // ranks] for head in bundle)


def _ranked(scores: HeadScores, free: Collection[Head]) -> list[Head]:
    return sorted(free, key=lambda each: (-float(scores.heads[each]), each))


def best_layers(scores: HeadScores, free: Collection[int], count: int) -> Full:
    """All heads of the `count` blocks of `free` that cost most to limit."""
    ranked = sorted(free, key=lambda block: (-float(scores.layers[block]), block))
    return frozenset((block, head) for block in ranked[:count] for head in range(scores.heads.shape[1]))


def limited(limits: Limits, full: Full) -> dict[Sublayer, Window]:
    """The limits of a plan: none for a layer that keeps all of its heads."""
    out: dict[Sublayer, Window] = {}
    for sublayer, window in limits.items():
        kept = sorted(head for block, head in full if block == sublayer.block)
        if len(kept) < window.kv_heads:
            out[sublayer] = window if tuple(kept) == window.full else window.with_heads(kept)
    return out


@dataclass
class Trial:
    """Plans measured by their judges; each once.

    Attributes:
        judges: Texts.
        limits: Every layer that may be limited, limited.
        reporter: For progress.
    """

    judges: Sequence[Judge]
    limits: Limits
    reporter: Reporter
    _known: dict[Full, float] = field(default_factory=dict)
    _modules: dict[tuple[Sublayer, tuple[int, ...]], Window] = field(default_factory=dict)
    _ends: list[Tensor] = field(default_factory=list)

    def costs(self, plans: Iterable[Full], what: str) -> list[float]:
        """Increase of the judges' losses, as `weigh` makes one cost of them, nats/token of the first judge."""
        plans = list(plans)
        missing = [plan for plan in dict.fromkeys(plans) if plan not in self._known]
        if missing:
            asked = [self._gone(plan) for plan in missing]
            batches = sum(len(judge.evaluator.mine()) for judge in self.judges)
            with self.reporter.progress(what, (len(missing) + 2 * (not self._ends)) * batches) as step:
                if not self._ends:
                    ends = [{}, limited(self.limits, frozenset())]
                    self._ends = [judge.evaluator.values(ends, advance=step.advance).mean(1) for judge in self.judges]
                costs = [
                    judge.evaluator.values(asked, advance=step.advance).mean(1) - dense
                    for judge, (dense, _) in zip(self.judges, self._ends, strict=True)
                ]
            found = weigh(self.judges, costs, [float(limited - dense) for dense, limited in self._ends]).tolist()
            check_numbers({str(number): cost for number, cost in enumerate(found)}, what)
            self._known |= dict(zip(missing, found, strict=True))
        return [self._known[plan] for plan in plans]

    def _gone(self, plan: Full) -> dict[Sublayer, Window]:
        """The plan's limits; equal ones are the same modules, so that plans share what they have in common."""
        made = limited(self.limits, plan)
        return {each: self._modules.setdefault((each, window.full), window) for each, window in made.items()}


def exchange(trial: Trial, start: Full, scores: HeadScores, free: Collection[Head]) -> Full:
    """Swap single heads while that makes the plan cheaper.

    Each round adds each of the best heads outside and leaves out each of the least heads inside, measures these plans,
    and then tries the best additions with the best omissions.

    Source: the exchange algorithm for subsets, Fedorov 1972. Inferred: the shortlists, by first-order scores.
    """
    plan = start
    for number in range(1, ROUNDS + 1):
        ranked = _ranked(scores, free)
        outside = [head for head in ranked if head not in plan][:SHORTLIST]
        inside = [head for head in reversed(ranked) if head in plan][:SHORTLIST]
        added = [plan | {head} for head in outside]
        less = [plan - {head} for head in inside]
        before, *costs = trial.costs([plan, *added, *less], f"exchange, round {number}")
        gains = sorted(zip(costs[: len(added)], outside, strict=True))[:3]
        losses = sorted(zip(costs[len(added) :], inside, strict=True))[:3]
        swapped = [plan - {old} | {new} for _, new in gains for _, old in losses]
        after, best = min(zip(trial.costs(swapped, f"exchange, round {number}"), swapped, strict=True),
                          key=lambda each: each[0])  # fmt: skip
        if after >= before:
            break
        trial.reporter.say(f"exchange: {before:.4f} -> {after:.4f} nats/token")
        plan = best
    return plan
