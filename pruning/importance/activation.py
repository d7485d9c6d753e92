"""Metrics read off the activations of one forward: x is the residual stream before a unit, y the stream after it."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pruning.console import Reporter
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling, Scores
from pruning.plan import Sublayer, Unit
from pruning.variants.taps import rms_normalise

Distance = Callable[[Tensor, Tensor], Tensor]
"""Streams before and after, float32 [b, T, D] each -> float32 [b, T]."""


def cosine(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """1 - mean over tokens of cos(x, y).

    Source: ShortGPT's Block Influence, arXiv 2403.03853; on sublayers as in arXiv 2407.16286.
    """
    return _mean_distance(evaluator, units, lambda x, y: 1 - _cosine(x, y), reporter)


def l1(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of |y - x|_1.

    Source: arXiv 2407.16286 (static metrics).
    """
    return _mean_distance(evaluator, units, lambda x, y: (y - x).abs().sum(-1), reporter)


def l2(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of |y - x|_2.

    Source: arXiv 2407.16286 (static metrics).
    """
    return _mean_distance(evaluator, units, lambda x, y: (y - x).norm(dim=-1), reporter)


def relative_l1(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of |y - x|_1 / |x|_1.

    Source: the relative magnitude of arXiv 2310.05015, with the L1 norm.
    """
    return _mean_distance(evaluator, units, lambda x, y: (y - x).abs().sum(-1) / x.abs().sum(-1), reporter)


def relative_l2(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of |y - x|_2 / |x|_2.

    Source: the relative magnitude of arXiv 2310.05015; arXiv 2407.16286.
    """
    return _mean_distance(evaluator, units, lambda x, y: (y - x).norm(dim=-1) / x.norm(dim=-1), reporter)


def angular(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of arccos(cos(x, y)) / pi.

    Source: arXiv 2403.17887, equation 7; that paper takes the last token only, this takes all.
    """
    return _mean_distance(evaluator, units, _angle, reporter)


def angular_runs(evaluator: Evaluator, length: int, reporter: Reporter) -> list[float]:
    """Angular distance over every run of `length` consecutive blocks, by its first block.

    Returns:
        L - length + 1 values in half turns: run l goes from before block l to after block l + length - 1.

    Source: arXiv 2403.17887, equation 7.
    """
    blocks = len(evaluator.blocks)
    spans = {
        Unit(first, "block"): (Sublayer(first, "attention"), Sublayer(first + length - 1, "ffn"))
        for first in range(blocks - length + 1)
    }
    return list(_walk(evaluator, spans, _angle, reporter).values())


def bip(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Bound on the mean change of the block's output when the unit is removed, L2 norm.

    The change d that a removed attention sublayer makes to the stream reaches the output directly and through the
    FFN F, whose gain on what its norm N lets through is |F(N(y))| / |N(y)|:
    |d| + |N(y) - N(x)| |F(N(y))| / |N(y)|. An FFN's or a block's removal reaches the output as it is: |y - x|.

    Source: LLM-BIP, arXiv 2412.06419, which scores heads and channels by a Lipschitz bound on the block's output.
    Inferred: the whole sublayer as one connection; the gain measured for each token in place of a Lipschitz constant.
    """
    direct = _mean_distance(evaluator, units, lambda x, y: (y - x).norm(dim=-1), reporter)
    wanted = {unit.block: unit for unit in units if unit.kind == "attention"}
    table = torch.zeros(len(evaluator.blocks), evaluator.windows, dtype=torch.float64)
    turned: dict[int, Tensor] = {}

    def visit(number: int, sublayer: Sublayer, before: Tensor, after: Tensor) -> None:
        if sublayer.block not in wanted:
            return
        if sublayer.kind == "attention":
            change = rms_normalise(after.float()) - rms_normalise(before.float())
            turned[number] = change.norm(dim=-1) / math.sqrt(before.shape[-1])
        elif number in turned:
            through = turned.pop(number) * (after - before).float().norm(dim=-1)
            table[sublayer.block, evaluator.span(number)] = through.double().mean(1).cpu()

    evaluator.walk(visit)
    through = parallel.gather(table).mean(1).tolist()
    values = {u: value + (through[u.block] if u.kind == "attention" else 0.0) for u, value in direct.values.items()}
    return Scores(values)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return functional.cosine_similarity(x, y, dim=-1)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    return torch.arccos(_cosine(x, y).clamp(-1, 1)) / math.pi


def _mean_distance(evaluator: Evaluator, units: Sequence[Unit], distance: Distance, reporter: Reporter) -> Scores:
    spans = {unit: (unit.sublayers[0], unit.sublayers[-1]) for unit in units}
    return Scores(_walk(evaluator, spans, distance, reporter))


def _walk(
    evaluator: Evaluator, spans: dict[Unit, tuple[Sublayer, Sublayer]], distance: Distance, reporter: Reporter
) -> dict[Unit, float]:
    """Mean distance over each span of sublayers, both ends included."""
    rows = {unit: row for row, unit in enumerate(spans)}
    starts, ends = defaultdict(list), defaultdict(list)
    for unit, (first, last) in spans.items():
        starts[first].append(unit)
        ends[last].append(unit)
    table = torch.zeros(len(spans), evaluator.windows, dtype=torch.float64)
    before: dict[tuple[int, Unit], Tensor] = {}
    with reporter.progress("activations", len(evaluator.mine()) * len(evaluator.blocks)) as step:

        def visit(number: int, sublayer: Sublayer, x: Tensor, y: Tensor) -> None:
            for unit in starts[sublayer]:
                before[number, unit] = x
            for unit in ends[sublayer]:
                values = distance(before.pop((number, unit)).float(), y.float())
                table[rows[unit], evaluator.span(number)] = values.double().mean(1).cpu()
            if sublayer.kind == "ffn":
                step.advance()

        evaluator.walk(visit)
    means = parallel.gather(table).mean(1).tolist()
    return {unit: means[row] for unit, row in rows.items()}
