"""Compensation: refit the output projections of kept sublayers for the pruned stream they now see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.families import Family
from pruning.forward.blocks import Arguments, Taps
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import Batches
from pruning.forward.walk import Wanted, advance, trim
from pruning.plan import Sublayer
from pruning.regression import HeldOutMoments, token_weights

HELD_BYTES = 2**28  # of what a sublayer's first run gave, so that small fits need no second


def output_projection(family: Family, sublayer: Sublayer) -> str | None:
    """Name of a sublayer's last linear map inside its block; None where a norm follows it or experts share the work.

    What a post norm lets through is no linear function of the weight, so there is no closed form.
    """
    if family.norms(sublayer.kind)[1] is not None:
        return None
    if sublayer.kind == "attention":
        return f"{family.attention}.{family.attention_output}"
    return f"{family.ffn}.{family.ffn_output}" if family.ffn_output else None


@contextmanager
def _inputs_of(projection: nn.Module) -> Iterator[list[Tensor]]:
    """Record what enters a module inside the `with`."""
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run of a sublayer gave: the stream after it, its projection's inputs [n, F], and the taps."""

    after: Tensor
    entering: Tensor
    noted: Taps


def compensate(
    evaluator: Evaluator,
    sublayer: Sublayer,
    streams: Batches,
    targets: Iterable[Tensor],
    arguments: Sequence[Arguments],
    *,
    taps: Sequence[Taps],
    wanted: Wanted | None = None,
) -> dict[str, Tensor]:
    """Take the pruned stream through a kept sublayer, in place, with its output projection refitted where that helps.

    With c the projection's input and s the family's update scale, fits (dense target - stream after) / s ≈ c ΔW by
    ridge on ΔW, that is towards the old weight (a penalty for each feature by its mean square), and takes it where the
    error on held-out windows falls. The model keeps its own weights.

    The sublayer runs once for the fit and once more for the stream after it, since holding c [N, F] of all tokens
    would take more memory than the streams; what the first run gave for the first `HELD_BYTES` is held.

    Args:
        evaluator: Of the dense model.
        sublayer: Kept.
        streams: The pruned stream before it; afterwards after it. Batches of [b, T, D].
        targets: The dense stream after it, the same; read once.
        arguments: What the model gives to every block, for each batch.
        taps: Where attention notes what it puts out, for each batch.
        wanted: What to keep of that; everything by default.

    Returns:
        Parameter name -> new weight (empty where the old one stays).

    Source: inferred; the layer-wise reconstruction of SparseGPT (arXiv 2301.00774) and ReplaceMe's closed-form map
        (arXiv 2505.02819) on the weights that stay, with the dense stream as target instead of the layer's own output.
    """
    name = output_projection(evaluator.family, sublayer)
    if name is None:
        advance(evaluator, sublayer, streams, arguments, taps=taps, wanted=wanted)
        return {}
    projection = evaluator.blocks[sublayer.block].get_submodule(name)
    assert isinstance(projection, nn.Linear)
    scale = evaluator.family.scale(evaluator.model.config)

    def run(number: int) -> _Run:
        noted = dict(taps[number])
        with _inputs_of(projection) as seen:
            out = evaluator.run_and_tap(sublayer, streams[number], arguments[number][sublayer.block], None, noted)
        if wanted is not None:
            trim(noted, sublayer, wanted)
        return _Run(out, seen[0], noted)

    moments = HeldOutMoments.zeros(projection.in_features, projection.out_features)
    held: dict[int, _Run] = {}
    first, room = 0, HELD_BYTES
    for number, target in enumerate(targets):
        one = run(number)
        residual = (target.float() - one.after.float()) / scale
        windows = target.shape[:-1]
        moments.add_windows(
            first, one.entering.float().view(*windows, -1), residual, token_weights(target).view(windows)
        )
        first += len(target)
        room -= one.after.nbytes + one.entering.nbytes
        if room >= 0:
            held[number] = one
    correction = moments.correction()
    old = projection.weight
    weight = old if correction is None else (old.double() + correction.T.to(old.device)).to(old.dtype)
    change = (weight - old).T
    for number, tap in enumerate(taps):
        one = held.pop(number) if number in held else run(number)
        tap |= one.noted
        streams[number] = one.after
        if correction is not None:
            difference = (one.entering @ change.to(one.entering.dtype)).to(one.after.dtype).view_as(one.after)
            streams[number] = one.after + scale * difference
            if sublayer.kind == "attention" and (noted := tap[sublayer.block]).output is not None:
                noted.output = noted.output + difference.view_as(noted.output)
    return {} if correction is None else {f"{evaluator.family.blocks}.{sublayer.block}.{name}.weight": weight}


def apply_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a dense model the compensated weights, in place; before blocks are dropped, since names count them all."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
