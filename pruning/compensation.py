"""Compensation: refit the output projections of kept sublayers for the pruned stream they now see."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruning.families import Family
from pruning.plan import Sublayer
from pruning.regression import HeldOutMoments
from pruning.subnetwork import Arguments, Evaluator, Taps


def token_weights(target: Tensor) -> Tensor:
    """Inverse mean square of each token's residual stream [..., D] -> float64 [N].

    The next norm divides by it, and a few massive activations would otherwise decide everything.
    """
    return 1 / target.double().pow(2).mean(-1).reshape(-1)


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


def compensate(
    evaluator: Evaluator,
    sublayer: Sublayer,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: Sequence[Arguments],
    taps: Sequence[Taps],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a kept sublayer on the pruned stream, with its output projection refitted where that helps.

    With c the projection's input and s the family's update scale, fits (dense target - stream after) / s ≈ c ΔW by
    ridge on ΔW, that is towards the old weight (a penalty for each feature by its mean square), and takes it where the
    error on held-out windows falls. The model
    keeps its own weights.

    Args:
        evaluator: Of the dense model.
        sublayer: Kept.
        inputs: The pruned stream before it, batches of [b, T, D].
        targets: The dense stream after it, the same.
        arguments: What the model gives to every block, for each batch.
        taps: Where attention notes what it puts out, for each batch.

    The projection's inputs of all batches are held meanwhile, [N, F].

    Returns:
        The stream after the sublayer, and parameter name -> new weight (empty where the old one stays).

    Source: inferred; the layer-wise reconstruction of SparseGPT (arXiv 2301.00774) and ReplaceMe's closed-form map
        (arXiv 2505.02819) on the weights that stay, with the dense stream as target instead of the layer's own output.
    """
    calls = list(zip(inputs, [every[sublayer.block] for every in arguments], taps, strict=True))
    name = output_projection(evaluator.family, sublayer)
    if name is None:
        return [evaluator.run_and_tap(sublayer, hidden, kwargs, None, tap) for hidden, kwargs, tap in calls], {}
    projection = evaluator.blocks[sublayer.block].get_submodule(name)
    assert isinstance(projection, nn.Linear)
    scale = evaluator.family.scale(evaluator.model.config)
    moments = HeldOutMoments.zeros(projection.in_features, projection.out_features)
    after, entering = [], []
    first = 0
    for (hidden, kwargs, tap), target in zip(calls, targets, strict=True):
        with _inputs_of(projection) as seen:
            out = evaluator.run_and_tap(sublayer, hidden, kwargs, None, tap)
        residual = (target.float() - out.float()) / scale
        windows = target.shape[:-1]
        moments.add_windows(first, seen[0].float().view(*windows, -1), residual, token_weights(target).view(windows))
        first += len(target)
        after.append(out)
        entering.append(seen[0])
    correction = moments.correction()
    if correction is None:
        return after, {}
    old = projection.weight
    weight = (old.double() + correction.T.to(old.device)).to(old.dtype)
    change = (weight - old).T
    for number, (features, tap) in enumerate(zip(entering, taps, strict=True)):
        difference = (features @ change.to(features.dtype)).to(after[number].dtype)
        after[number] = after[number] + scale * difference.view_as(after[number])
        if sublayer.kind == "attention" and (noted := tap[sublayer.block]).output is not None:
            noted.output = noted.output + difference.view_as(noted.output)
    return after, {f"{evaluator.family.blocks}.{sublayer.block}.{name}.weight": weight}


def apply_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a dense model the compensated weights, in place; before blocks are dropped, since names count them all."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
