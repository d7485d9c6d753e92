"""What it costs to limit each KV head to each size of window: scored by gates.

What a model fetches from far away sits in single KV heads. A plan names the heads that stay full; a layer of which all
stay is left as it is, one of which none stays is limited whole.

Source: retrieval heads, arXiv 2404.15574; gates by head, arXiv 2410.10819. There gates are trained, here their gradient
    is read off.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.finite import check_numbers
from pruning.forward import parallel
from pruning.forward.gates import each_head_gradients
from pruning.forward.streams import describe
from pruning.plan import Sublayer, window_part
from pruning.search.selection import Judge, weights_by_share
from pruning.variants.window import Window
from pruning.variants.window_fit import resized

Head = tuple[int, int]
"""Block and KV head."""

Full = frozenset[Head]
"""The heads that keep every token."""

Limits = Mapping[Sublayer, Window]

REACH = 0.5  # of the way from limited to full that scores are taken on


@dataclass(frozen=True, slots=True)
class HeadScores:
    """What limiting each KV head to one size of window costs, first order, in nats/token of the first judge.

    Attributes:
        heads: float64 [L, K], the judges' sum as `weigh` makes it; 0 where nothing is limited.
        layers: The same of whole layers [L].
        by_judge: Judge -> [L, K], as they are.
    """

    heads: Tensor
    layers: Tensor
    by_judge: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """What becomes of every KV head.

    Attributes:
        full: Heads that keep every token.
        sizes: Block, and its window's share of the usual one, where it is another.
    """

    full: Full
    sizes: tuple[tuple[int, float], ...] = ()

    def size(self, block: int) -> float:
        """Of a block's window, as a share of the usual one."""
        return dict(self.sizes).get(block, 1.0)


def score(
    judges: Sequence[Judge], limits: Limits, samples: int, reporter: Reporter, reach: float = REACH,
    sizes: Sequence[float] = (1.0,),
) -> dict[float, HeadScores]:  # fmt: skip
    """Score all heads at once: what they lose by a gate on each, between limited (0) and full (1).

    All gates go together from `reach` to 0; the integral on the way is a Gauss-Legendre sum of `samples` points, so
    that the scores of all heads sum to what this way costs. Budgets are small, so the half of the way is taken that
    is near their plans: on WikiText it chose better than the whole way (docs/decisions/windows.md).

    The same backward pass tells the gradient by every larger window, which is enough for the text. A smaller one costs
    more than a gradient at the usual one sees, and what is fetched from far away is lost as a whole before its gradient
    sees a larger one. So these get ways of their own.

    Args:
        judges: The first is the text.
        limits: Every layer that may be limited, with the usual window.
        samples: Points on the way.
        reporter: For progress.
        reach: Where the way begins.
        sizes: Shares of the usual window to score, 1 among them.

    Returns:
        Size -> scores; a larger window never costs a head more.

    Source: Aumann and Shapley, Values of Non-Atomic Games, 1974; integrated gradients, arXiv 1703.01365.
    """
    found = _gradients(judges, limits, [size for size in sizes if size >= 1], samples, reach, reporter)
    for size in sizes:
        if size != 1:
            apart = judges if size < 1 else judges[1:]
            of_size = _gradients(apart, resized_by(limits, size), [1.0], samples, reach, reporter)
            found |= {(name, size): table for (name, _), table in of_size.items()}
    return _by_size(judges, sizes, found)


def _gradients(
    judges: Sequence[Judge], limits: Limits, sizes: Sequence[float], samples: int, reach: float, reporter: Reporter
) -> dict[tuple[str, float], Tensor]:
    """What each judge loses by each head [L, K] at each size, on the way from `reach` to these limits."""
    nodes, weights = numpy.polynomial.legendre.leggauss(samples)
    gates = [reach * (1 - float(node)) / 2 for node in nodes]
    among = {
        sublayer: window.among([window_part(window.size, size) for size in sizes])
        for sublayer, window in limits.items()
    }
    evaluators = [judge.evaluator.view([], among) for judge in judges]
    described = describe(limits)
    steps = samples * sum(len(evaluator.mine()) for evaluator in evaluators)
    found: dict[tuple[str, float], Tensor] = {}
    with reporter.progress("gates by head", steps) as step:
        for judge, evaluator in zip(judges, evaluators, strict=True):
            key = ["heads", evaluator.text, described, samples, reach, list(sizes)]
            known = evaluator.journal.recall(key)
            if parallel.everywhere(known is not None):
                costs = torch.tensor(known, dtype=torch.float64)
            else:
                shape = len(evaluator.blocks), int(evaluator.model.config.num_key_value_heads), 1 + len(sizes)
                table = torch.zeros(evaluator.windows, *shape, dtype=torch.float64)
                for gate, weight in zip(gates, weights, strict=True):
                    start = torch.zeros(shape)
                    start[..., 0], start[..., 1 + sizes.index(1.0)] = gate, 1 - gate
                    for number, part in each_head_gradients(evaluator, start):
                        table[evaluator.span(number)] += part * float(weight) / 2 * reach
                        step.advance()
                mean = parallel.gather(table).mean(0)
                costs = mean[..., 1:] - mean[..., :1]
                check_numbers(_named(costs), f"gates by head on {judge.name}")
                evaluator.journal.keep(key, costs.tolist())
            found |= {(judge.name, size): costs[..., number] for number, size in enumerate(sizes)}
    return found


def _by_size(
    judges: Sequence[Judge], sizes: Sequence[float], found: Mapping[tuple[str, float], Tensor]
) -> dict[float, HeadScores]:  # fmt: skip
    """Scores by size from what each judge loses [L, K]; the shares of judges are those at the usual window."""
    usual = [found[judge.name, 1.0] for judge in judges]
    heads_in_all, layers_in_all = _positive(usual), _positive([table.sum(1) for table in usual])
    scores: dict[float, HeadScores] = {}
    more: HeadScores | None = None
    for size in sorted(sizes, reverse=True):
        own = {judge.name: found[judge.name, size] for judge in judges}
        tables = list(own.values())
        heads = weigh(judges, tables, heads_in_all)
        layers = weigh(judges, [table.sum(1) for table in tables], layers_in_all)
        if more is not None:
            heads, layers = heads.maximum(more.heads), layers.maximum(more.layers)
        scores[size] = more = HeadScores(heads, layers, own)
    return scores


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
        f"attention.{block} head {head}": sum(values)
        for block, row in enumerate(table.tolist())
        for head, values in enumerate(row)
    }


def options(
    scores: Mapping[float, HeadScores], block: int, free: Sequence[int], ranks: int = 1, *, whole: bool = False
) -> list[tuple[float, float, tuple[int, ...]]]:
    """What may become of a layer: each number of its heads, those that cost most, full, the others limited to a size.

    Args:
        scores: Of all sizes.
        block: Of the layer.
        free: Its heads to choose from; others stay limited to the usual window.
        ranks: Tensor-parallel ranks, each of which is to have as many full heads of a layer as the others. Heads are
            then taken together, one of each rank.
        whole: Full are all of them or none.

    Returns:
        (cost of the limited ones, size, heads that are full); that all are is the last.
    """
    each = next(iter(scores.values())).heads.shape[1]
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for size, of_size in scores.items():
        if size != 1 and len(free) < each:
            continue
        own = ranked(of_size, [(block, head) for head in free])
        of_ranks = [[head for _, head in own if head * ranks // each == rank] for rank in range(ranks)]
        bundles = list(zip(*of_ranks, strict=False))
        for count in range(0, len(bundles), max(1, len(bundles)) if whole else 1):
            full = tuple(sorted(head for bundle in bundles[:count] for head in bundle))
            cost = sum(float(of_size.heads[block, head]) for head in free if head not in full)
            found.append((cost, size, full))
    return [*found, (0.0, 1.0, tuple(sorted(free)))]


def ranked(scores: HeadScores, free: Collection[Head]) -> list[Head]:
    """Heads that cost most to limit first; ties by position."""
    return sorted(free, key=lambda each: (-float(scores.heads[each]), each))


def best_layers(scores: HeadScores, free: Collection[int], count: int) -> Full:
    """All heads of the `count` blocks of `free` that cost most to limit."""
    ranked = sorted(free, key=lambda block: (-float(scores.layers[block]), block))
    return frozenset((block, head) for block in ranked[:count] for head in range(scores.heads.shape[1]))


def resized_by(limits: Limits, size: float) -> dict[Sublayer, Window]:
    """Every limit with a share of its window."""
    return {sublayer: resized(window, window_part(window.size, size)) for sublayer, window in limits.items()}


def sized(limits: Limits, plan: HeadPlan) -> dict[Sublayer, Window]:
    """Every limit with the window that the plan says."""
    return {each: resized(window, window_part(window.size, plan.size(each.block))) for each, window in limits.items()}


def limited(limits: Limits, full: Full) -> dict[Sublayer, Window]:
    """The limits of a plan: none for a layer that keeps all of its heads."""
    out: dict[Sublayer, Window] = {}
    for sublayer, window in limits.items():
        kept = sorted(head for block, head in full if block == sublayer.block)
        if len(kept) < window.kv_heads:
            out[sublayer] = window if tuple(kept) == window.full else window.with_heads(kept)
    return out
