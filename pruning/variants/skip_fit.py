"""Which tokens may skip which FFNs: what they get instead, what that costs, and the predictor of that cost.

With f what an FFN puts out for a token, g the map of low rank of what it reads that is nearest to f, e = f - g, s the
root mean square of the stream after it and S what the next words feel of an error there (`forward/sensitivity.py`),
skipping costs about e'Se / (2 s^2) nats. The logarithm of that cost is predicted from what the FFN reads, x, by ridge
regression. A layer's predictions
become nats again by the mean of exp(what the regression leaves) (smearing), so that those of all layers compare.

Source: skipping FFNs that change the stream little, FFN-SkipLLM, arXiv 2404.03865; smearing: Duan 1983. Inferred: the
    cost in nats, and its prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.plan import FIRST_TOKENS, Sublayer
from pruning.regression import Affine, HeldOutMoments, token_weights
from pruning.variants.base import Job
from pruning.variants.skip import Skip, instead, scores

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator, Given

GRADIENT_TOKENS = 4096  # that the sensitivities are measured on


@dataclass(frozen=True, slots=True)
class Predictor:
    """What is predicted of one FFN.

    Attributes:
        weight: w, [D] float64: w·x grows with the logarithm of the cost.
        map: What tokens get that skip the FFN.
        costs: Predicted cost of skipping it for each calibration token that may, nats, [N] float64.
        explained: Share of the variance of the logarithm that the predictor explains, on the same tokens.
    """

    weight: Tensor
    map: Affine
    costs: Tensor
    explained: float


@dataclass(frozen=True, slots=True)
class Share:
    """How much of an FFN is skipped (`Job.prepared`).

    Attributes:
        weight: w, [D].
        map: What they get instead; its constant is found again.
        tokens: Calibration tokens that skip it.
    """

    weight: Tensor
    map: Affine
    tokens: int


def may_skip(rows: Tensor) -> Tensor:
    """Which tokens of calibration rows [b, T, ...] may skip anything, bool [b, T]."""
    free = torch.arange(rows.shape[1], device=rows.device) >= FIRST_TOKENS
    return free.expand(rows.shape[:2])


@torch.no_grad()
def predictors(
    evaluator: "Evaluator", felt: Mapping[int, Tensor], rank: int, reporter: "Reporter"
) -> dict[Sublayer, Predictor]:  # fmt: skip
    """Predictors of FFNs on the dense model's own stream; one FFN's inputs and outputs are in memory at a time.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        felt: Block whose FFN may be skipped -> S of that FFN's output, [D, D] float64, from `sensitivities`.
        rank: r of what tokens get instead.
        reporter: For progress.
    """

    def visit(sublayer: Sublayer, streams: list[Tensor], given: "Given", taps: Sequence["Taps"]) -> Predictor:
        return _predictor(evaluator, sublayer, streams, given, taps, felt[sublayer.block], rank)

    with reporter.progress("predictors", max(felt, default=-1) + 1) as step:
        return evaluator.each_ffn(felt, visit, step.advance)


def _predictor(
    evaluator: "Evaluator", sublayer: Sublayer, streams: list[Tensor], given: "Given",
    taps: Sequence["Taps"], felt: Tensor, rank: int,
) -> Predictor:  # fmt: skip
    """The predictor of one FFN; takes the streams through it, in place."""
    ffn = evaluator.blocks[sublayer.block].get_submodule(evaluator.family.ffn)
    read: list[Tensor] = []
    put_out: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        read.append(given[0].float())
        put_out.append(output.float())

    handle = ffn.register_forward_hook(note)
    try:
        for number, hidden in enumerate(streams):
            streams[number] = evaluator.run_and_tap(sublayer, hidden, given[number], None, taps[number])
    finally:
        handle.remove()
    weights = [token_weights(after).view(after.shape[:-1]).to(after.device) for after in streams]
    size, first = felt.shape[0], 0
    moments = HeldOutMoments.zeros(size, size)
    for x, f, w in zip(read, put_out, weights, strict=True):
        moments.add_windows(first, x, f, w * may_skip(w))
        first += len(x)
    near = moments.low_rank(rank)
    matrix, bias, root = (each.to(read[0].device) for each in (near.matrix, near.bias, _root(felt)))
    logs: list[Tensor] = []
    moments, first = HeldOutMoments.zeros(size, 1), 0
    for x, f, w in zip(read, put_out, weights, strict=True):
        cost = ((f.double() - x.double() @ matrix - bias) @ root).square().sum(-1) * w / 2
        logs.append(cost.clamp_min(1e-30).log())
        moments.add_windows(first, x, logs[-1][..., None].float(), may_skip(x).double())
        first += len(x)
    found = moments.low_rank(1)
    weight, intercept = found.matrix[:, 0], float(found.bias[0])
    free = [may_skip(x) for x in read]
    predicted = torch.cat([scores(x[own], weight.to(x.device)) for x, own in zip(read, free, strict=True)]).double()
    actual = torch.cat([log[own] for log, own in zip(logs, free, strict=True)])
    left = actual - predicted - intercept
    costs = (predicted + intercept).exp() * left.exp().mean()
    return Predictor(weight, near, costs.cpu(), 1 - float(left.var() / actual.var()))


def _root(felt: Tensor) -> Tensor:
    """R with S = R R', [D, D] float64."""
    values, vectors = torch.linalg.eigh(felt)
    return vectors * values.clamp_min(0).sqrt()


@torch.no_grad()
def fitted(job: Job) -> Skip:
    """The threshold under which as many tokens lie as shall skip the FFN, and the constant that suits them.

    Both on the stream as pruned so far. Tokens count by the inverse mean square of the stream after the FFN.
    """
    evaluator, family, share = job.evaluator, job.evaluator.family, job.prepared
    assert isinstance(share, Share)
    block = evaluator.blocks[job.sublayer.block]
    ffn, before = block.get_submodule(family.ffn), family.norms("ffn")[0]
    norm = nn.Identity() if before is None else block.get_submodule(before)
    like = job.inputs[0]
    made = Skip(like.shape[-1], 0.0, share.map.up.shape[0])
    made.skip_weight.data = share.weight.to(like.device, like.dtype)
    made.skip_down.data = share.map.down.T.to(like.device, like.dtype).contiguous()
    made.skip_up.data = share.map.up.T.to(like.device, like.dtype).contiguous()
    read = [norm(evaluator.reads(job.sublayer, x, taps)) for x, taps in zip(job.inputs, job.taps, strict=True)]
    ranked = torch.cat([scores(x, made.skip_weight)[may_skip(x)] for x in read]).sort().values.double()
    count = min(share.tokens, len(ranked))
    ends = ranked[count - 1], ranked[min(count, len(ranked) - 1)] + (count == len(ranked))
    made.threshold = float(ends[0] + ends[1]) / 2
    total, weight, scale = torch.zeros(like.shape[-1], dtype=torch.float64), 0.0, family.scale(evaluator.model.config)
    for x, stream in zip(read, job.inputs, strict=True):
        skips = (scores(x, made.skip_weight) < made.threshold) & may_skip(x)
        if not skips.any():
            continue
        update = ffn(x[skips]).float()
        each = token_weights(stream[skips].float() + scale * update)
        missing = update - instead(made, x[skips]).float()
        total += (each.to(update.device)[:, None] * missing).sum(0).double().cpu()
        weight += float(each.sum())
    made.skip_update.data = (total / weight).to(like.device, like.dtype) if weight else torch.zeros_like(like[0, 0])
    return made.requires_grad_(False)
