"""Give removed blocks the weights of kept ones and low-rank differences (`shared`), in closed form."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.families import output_projection, places
from pruning.plan import KINDS, Kind, Sublayer
from pruning.regression import token_weights
from pruning.variants.shared import SharedEmulation, linear_maps

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator
    from pruning.forward.walk import Seen

OVERSAMPLING = 8
ITERATIONS_TO_CHOOSE, ITERATIONS_TO_FIT = 1, 8

Moments = Mapping[tuple[Kind, str], Tensor]
"""Kind of sublayer and name of a linear map in it -> what enters it, sum of x x^T, float32 [in, in]."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The best approximation U D of a rank to a difference, for inputs of one second moment.

    Attributes:
        down: D, [r, in].
        up: U, [out, r].
        error: Sum of squares over the inputs of what it leaves.
    """

    down: Tensor
    up: Tensor
    error: float


@torch.no_grad()
def low_rank(difference: Tensor, moment: Tensor, rank: int, iterations: int) -> LowRank:
    """The matrix of rank r that is nearest to a difference Δ [out, in] on inputs x, in the mean square of (Δ - U D) x.

    That is the truncated SVD of Δ C^(1/2), C the inputs' second moment, times C^(-1/2); of C = 1 the SVD of Δ itself.
    Its left singular vectors Q are the eigenvectors of Δ C Δ^T, found by subspace iteration (a whole SVD takes minutes
    at the size of large models); U D = Q Q^T Δ, with the singular values parted evenly between both.

    Source: subspace iteration, Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. Inferred: C.
    """
    size = min(rank + OVERSAMPLING, difference.shape[0])
    base = torch.randn(difference.shape[0], size, generator=torch.Generator().manual_seed(0)).to(difference)

    def applied(basis: Tensor) -> Tensor:
        return difference @ (moment @ (difference.T @ basis))

    for _ in range(1 + iterations):
        base = torch.linalg.qr(applied(base)).Q
    values, vectors = torch.linalg.eigh((base.T @ applied(base)).double())
    up = torch.linalg.qr(base.double()).Q @ vectors.flip(1)[:, :rank]
    down = up.T @ difference.double()
    root = down.norm(dim=1).clamp_min(1e-12).sqrt()
    whole = ((difference @ moment) * difference).double().sum()
    error = float((whole - values.flip(0)[:rank].sum()).clamp_min(0))
    return LowRank((down / root[:, None]).to(difference), (up * root).to(difference), error)


@torch.no_grad()
def differences(
    evaluator: "Evaluator",
    wanted: Sequence[Sublayer],
    gone: Collection[Sublayer],
    rank: int,
    reporter: "Reporter",
    enter: Callable[..., Any],
) -> dict[Sublayer, SharedEmulation]:
    """What every shared sublayer borrows and its low-rank differences from it, outputs not yet normalised.

    Each block borrows from the kept one that leaves the least: the error of W_j x + U D x against W_i x over what the
    map reads in the dense model, relative to the latter, summed over the block's maps. Of equals the nearest.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        wanted: The sublayers that share.
        gone: All that do not stay as they are; they cannot lend.
        rank: r.
        reporter: For progress.
        enter: `forward.walk.enter`.

    Source: FlexiGPT, arXiv 2501.14713: low-rank differences by SVD, and a metric on them that chooses the base.
        Inferred: this metric, and weighing by inputs: the SVD of the weights alone was worse
        (docs/decisions/healing.md).
    """
    blocks = sorted({sublayer.block for sublayer in wanted})
    kept = [b for b in range(len(evaluator.blocks)) if not any(Sublayer(b, kind) in gone for kind in KINDS)]
    found: dict[Sublayer, SharedEmulation] = {}
    streams, arguments = enter(evaluator, copies=1)
    with reporter.progress("shared blocks", blocks[-1] + 1) as step:
        for index in range(blocks[-1] + 1):
            with _moments_of(evaluator, index if index in blocks else None) as moments:
                for number, every in enumerate(arguments):
                    streams[number] = evaluator.run_block(index, streams[number], every[index], {})
            if index in blocks:
                errors = {lender: _error(evaluator, index, lender, moments, rank) for lender in kept}
                lender = min(kept, key=lambda j: (errors[j], abs(j - index), j))
                reporter.say(f"  block {index} borrows from {lender}")
                for kind in KINDS:
                    found[Sublayer(index, kind)] = _fitted(evaluator, Sublayer(index, kind), lender, moments, rank)
            step.advance()
    return found


def _sublayer(evaluator: "Evaluator", block: int, kind: Kind) -> nn.Module:
    module: nn.Module = getattr(evaluator.blocks[block], places(evaluator.family, kind)[0])
    return module


@contextmanager
def _moments_of(evaluator: "Evaluator", block: int | None) -> Iterator[Moments]:
    """Sum up what enters the linear maps of a block inside the `with`."""
    moments: dict[tuple[Kind, str], Tensor] = {}

    def add(key: tuple[Kind, str], entering: Tensor) -> None:
        rows = entering.flatten(0, -2).float()
        moments[key] = moments[key] + rows.T @ rows if key in moments else rows.T @ rows

    with ExitStack() as stack:
        for kind in KINDS if block is not None else ():
            for name, linear in linear_maps(_sublayer(evaluator, block, kind)).items():  # type: ignore[arg-type]
                handle = linear.register_forward_pre_hook(lambda _, given, key=(kind, name): add(key, given[0]))
                stack.callback(handle.remove)
        yield moments


def _error(evaluator: "Evaluator", block: int, lender: int, moments: Moments, rank: int) -> float:
    """Relative error that differences of a rank leave, summed over the maps of a block."""
    total = 0.0
    for kind in KINDS:
        theirs = linear_maps(_sublayer(evaluator, lender, kind))
        for name, linear in linear_maps(_sublayer(evaluator, block, kind)).items():
            own, moment = linear.weight.float(), moments[kind, name]
            left = low_rank(own - theirs[name].weight.float(), moment, rank, ITERATIONS_TO_CHOOSE).error
            total += (left / float(((own @ moment) * own).double().sum())) ** 0.5
    return round(total, 6)


def _fitted(evaluator: "Evaluator", sublayer: Sublayer, lender: int, moments: Moments, rank: int) -> SharedEmulation:
    own, theirs = (_sublayer(evaluator, block, sublayer.kind) for block in (sublayer.block, lender))
    like = next(own.parameters())
    with torch.device(like.device):
        emulation = SharedEmulation.of(own, lender, rank, output_projection(evaluator.family, sublayer.kind))
    lenders = linear_maps(theirs)
    for name, linear in linear_maps(own).items():
        shared = emulation.maps()[name]
        difference = linear.weight.float() - lenders[name].weight.float()
        found = low_rank(difference, moments[sublayer.kind, name], shared.down.out_features, ITERATIONS_TO_FIT)
        shared.down.weight.data, shared.up.weight.data = found.down, found.up
        if linear.bias is not None:
            shared.up.bias.data = linear.bias.float() - lenders[name].bias.float()
    return emulation.to(like.dtype).requires_grad_(False)


@torch.no_grad()
def normalise_output(
    evaluator: "Evaluator",
    sublayer: Sublayer,
    emulation: SharedEmulation,
    seen: "Seen",
    noted: "Sequence[Taps]",
    inputs: Sequence[Tensor],
    taps: "Sequence[Taps]",
) -> None:
    """Scale every feature that a shared sublayer's output projection gives, in place.

    With d what the projection gives in the dense model and p what the shared one gives in the pruned model, by
    s = <d, p> / <p, p>: what agrees with the dense update gets its size, what does not is shrunk.

    Args:
        evaluator: Of the dense model.
        sublayer: Which.
        emulation: Its differences.
        seen: What it reads in the dense model.
        noted: What attention before it puts out there, for each batch.
        inputs: The pruned stream before it, batches of [b, T, D].
        taps: The same of the pruned stream as `noted`.

    Source: FlexiGPT, arXiv 2501.14713, has a normalisation of output features, which it trains. Inferred: this one.
    """
    output = output_projection(evaluator.family, sublayer.kind)
    assert output is not None
    own = _sublayer(evaluator, sublayer.block, sublayer.kind).get_submodule(output)
    shared = emulation.maps()[output]
    both = torch.zeros(2, evaluator.model.config.hidden_size, dtype=torch.float64)
    normed_after = evaluator.family.norms(sublayer.kind)[1] is not None
    for stream, arguments, there, x, here in zip(seen.streams, seen.arguments, noted, inputs, taps, strict=True):
        with _outputs_of(own) as wanted:
            after = evaluator.run_and_tap(sublayer, stream, arguments, None, dict(there))
        with _outputs_of(shared) as found:
            evaluator.run_and_tap(sublayer, x, arguments, emulation, dict(here))
        d, p = (each[0].float().reshape(-1, both.shape[1]) for each in (wanted, found))
        weights = token_weights(d if normed_after else after)[:, None].to(d)
        both += torch.stack([(weights * d * p).sum(0), (weights * p * p).sum(0)]).double().cpu()
    assert shared.scale is not None
    shared.scale.copy_(both[0] / both[1].clamp_min(1e-30))


@contextmanager
def _outputs_of(projection: nn.Module) -> Iterator[list[Tensor]]:
    """Record what leaves a module inside the `with`."""
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
