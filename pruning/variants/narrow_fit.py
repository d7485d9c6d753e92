"""Which units an FFN keeps, what leaving the others out costs, and its output projection for those that stay.

With c [N, F] what enters the output projection W [D, F], H = c'c / N and S what the next words feel of an error of the
FFN's output (`forward/sensitivity.py`), leaving units out and refitting W for the rest costs half of
sum_ij H_ij (w_i - w'_i)' S (w_j - w'_j) nats per token, to second order. One unit more costs
w_j' S w_j / (2 [H^-1]_jj), exactly that sum. Units go by that cost, some at a time, and H^-1 follows. One order of a
layer serves all its widths.

Source: Optimal Brain Surgeon (Hassibi and Stork 1993) on the output projection's inputs, as in SparseGPT (arXiv
    2301.00774); the two moments as factors: K-FAC (arXiv 1503.05671); a width for each layer: Adapt-Pruner (arXiv
    2502.03460). Inferred: tokens weighted by the inverse mean square of the stream, as everywhere here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.plan import Sublayer
from pruning.regression import HeldOutMoments, token_weights
from pruning.variants.base import Job
from pruning.variants.narrow import Narrow, multiple_of, narrowed

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator, Given

RIDGE = 0.3  # of the Gram matrix, by the units' own scales: without, what units have in common is overrated
GRADIENT_TOKENS = 8192  # that the sensitivities are measured on
CHUNKS = 8  # in which as many units go as a width loses at a time


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which an FFN loses its units.

    Attributes:
        order: All units, the first to go first, int64 [F].
        errors: Units left -> squared error of the FFN's output, refitted, as a share of `square`; 0 for all of them.
        square: Of the output of all units, in the metric that units were chosen by.
    """

    order: Tensor
    errors: Mapping[int, float]
    square: float

    def kept(self, units: int) -> Tensor:
        """The numbers of the last `units` units, ascending."""
        return self.order[len(self.order) - units :].sort().values

    def loss(self, units: int) -> float:
        """Predicted increase of the loss where so many units stay, nats per token (from `narrowings`)."""
        return self.errors[units] * self.square / 2


def eliminate(gram: Tensor, weight: Tensor, chunk: int) -> Elimination:
    """Leave units out, the cheapest first, with the output projection refitted for the rest after every chunk.

    Args:
        gram: H, [F, F] float64.
        weight: W, [D, F].
        chunk: Units that go at a time.

    Returns:
        The order, and the exact errors after each chunk, with `RIDGE` in H.
    """
    diagonal = gram.diagonal()
    ridge = RIDGE * diagonal + 1e-9 * diagonal.mean() + 1e-30
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(ridge)))
    rows = weight.double().T  # [F, D], refitted as units go
    square = float(((gram @ rows) * rows).sum() + (ridge[:, None] * rows.square()).sum())
    left, total = torch.arange(len(gram)), 0.0
    order: list[Tensor] = []
    errors = {len(left): 0.0}
    while len(left):
        costs = rows.square().sum(1) / inverse.diagonal()
        gone = costs.argsort(stable=True)[: len(left) % chunk or chunk]
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[gone] = False
        cross, among = inverse[stay][:, gone], inverse[gone][:, gone]
        step = torch.linalg.solve(among, torch.cat([rows[gone], cross.T], 1))
        lost, update = step[:, : rows.shape[1]], step[:, rows.shape[1] :]
        total += float((rows[gone] * lost).sum())
        order.append(left[gone])
        rows, inverse, left = rows[stay] - cross @ lost, inverse[stay][:, stay] - cross @ update, left[stay]
        errors[len(left)] = total / square if square else 0.0
    return Elimination(torch.cat(order), errors, square)


@contextmanager
def _entering(projection: nn.Module) -> Iterator[list[Tensor]]:
    """Record what enters a module inside the `with`."""
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _ffn_of(evaluator: "Evaluator", block: int) -> tuple[nn.Module, str, nn.Linear]:
    """An FFN, the attribute of its output projection, and that."""
    family = evaluator.family
    assert family.ffn_output is not None
    ffn = evaluator.blocks[block].get_submodule(family.ffn)
    projection = ffn.get_submodule(family.ffn_output)
    assert isinstance(projection, nn.Linear)
    return ffn, family.ffn_output, projection


def output_of(evaluator: "Evaluator", block: int) -> nn.Linear:
    """The output projection of an FFN."""
    return _ffn_of(evaluator, block)[2]


@torch.no_grad()
def narrowings(evaluator: "Evaluator", felt: Mapping[int, Tensor], reporter: "Reporter") -> dict[Sublayer, Elimination]:
    """The order in which FFNs lose their units, on the dense model's own stream; one Gram matrix at a time.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        felt: Block whose FFN may be narrowed -> S of that FFN's output, [D, D] float64, from `sensitivities`.
        reporter: For progress.
    """

    def visit(sublayer: Sublayer, streams: list[Tensor], given: "Given", taps: Sequence["Taps"]) -> Elimination:
        return _order(evaluator, sublayer, streams, given, taps, felt[sublayer.block])

    with reporter.progress("units", max(felt, default=-1) + 1) as step:
        return evaluator.each_ffn(felt, visit, step.advance)


def _order(
    evaluator: "Evaluator", sublayer: Sublayer, streams: list[Tensor], given: "Given",
    taps: Sequence["Taps"], felt: Tensor,
) -> Elimination:  # fmt: skip
    """The order of one FFN's units; takes the streams through it, in place."""
    _, _, projection = _ffn_of(evaluator, sublayer.block)
    size, count = projection.in_features, 0
    gram = torch.zeros(size, size, dtype=torch.float64)
    for number, hidden in enumerate(streams):
        with _entering(projection) as seen:
            after = evaluator.run_and_tap(sublayer, hidden, given[number], None, taps[number])
        streams[number] = after
        rows = seen[0].flatten(0, -2).float() * token_weights(after).to(after.device, torch.float32).sqrt()[:, None]
        count += len(rows)
        with torch.autocast(rows.device.type, enabled=False):
            gram += (rows.T @ rows).double().cpu()
    values, vectors = torch.linalg.eigh(felt)
    root = values.clamp_min(0).sqrt()[:, None] * vectors.T  # S = root' root
    weight = root @ projection.weight.detach().double().cpu()
    return eliminate(gram / count, weight, max(1, multiple_of(size) // CHUNKS))


@torch.no_grad()
def refitted(job: Job) -> Narrow:
    """The chosen units (`Job.prepared`, int64 [n]), the output projection refitted on the stream as pruned so far.

    It aims at the dense stream after the FFN, so it also mends what was lost before; where a norm follows the FFN, at
    what all of its units put out. With r the residual and c [N, n] what the units give, fits r ≈ c ΔW by ridge towards
    the weights as they are, and takes it where the error on held-out windows falls. A token counts by the inverse mean
    square of the dense stream and of what is amiss with it: where a massive activation came or went too early, errors
    are a hundred times the stream.
    """
    evaluator, family = job.evaluator, job.evaluator.family
    ffn, output, projection = _ffn_of(evaluator, job.sublayer.block)
    units: Tensor = job.prepared
    made = narrowed(ffn, output, evaluator.model.config, units)
    before, after = family.norms("ffn")
    norm = nn.Identity() if before is None else evaluator.blocks[job.sublayer.block].get_submodule(before)
    scale = family.scale(evaluator.model.config)
    moments, first = HeldOutMoments.zeros(len(units), projection.out_features), 0
    for x, target, taps in zip(job.inputs, job.targets, job.taps, strict=True):
        with _entering(projection) as seen:
            whole = ffn(norm(evaluator.reads(job.sublayer, x, taps)))
        entering = seen[0][..., units]
        goal = whole if after is not None else (target.float() - x.float()) / scale
        residual = goal.float() - made.projection(entering).float()
        amiss = residual.square().mean(-1).double() * scale**2
        weights = 1 / (1 / token_weights(target).view(target.shape[:-1]) + amiss)
        moments.add_windows(first, entering.float(), residual, weights)
        first += len(target)
    correction = moments.correction()
    if correction is not None:
        weight = made.projection.weight
        weight.data = (weight.double() + correction.T.to(weight.device)).to(weight.dtype)
    return made
