"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.console import Reporter
from pruning.modeling import BiasEmulation, LowRankEmulation, rms_normalise
from pruning.plan import KINDS, EmulationKind, Kind, Sublayer
from pruning.subnetwork import Evaluator

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
HOLD_OUT_EVERY = 8


@dataclass
class NormalEquations:
    """Weighted moments of features x [N, D] and targets y [N, M], accumulated in a stream, float64."""

    weight: float
    x_sum: Tensor
    y_sum: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    @classmethod
    def zeros(cls, features: int, targets: int) -> "NormalEquations":
        """Empty moments for D features and M targets."""
        wide = {"dtype": torch.float64}
        return cls(
            0.0,
            torch.zeros(features, **wide),
            torch.zeros(targets, **wide),
            torch.zeros(features, features, **wide),
            torch.zeros(features, targets, **wide),
            0.0,
        )

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add rows x [n, D], y [n, M] with weights [n]."""
        x, y, weights = x.double().cpu(), y.double().cpu(), weights.double().cpu()
        weighted = x * weights[:, None]
        self.weight += float(weights.sum())
        self.x_sum += weighted.sum(0)
        self.y_sum += (y * weights[:, None]).sum(0)
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += float((y.pow(2) * weights[:, None]).sum())

    def plus(self, other: "NormalEquations") -> "NormalEquations":
        """Moments of both sets of rows."""
        return NormalEquations(
            self.weight + other.weight, self.x_sum + other.x_sum, self.y_sum + other.y_sum,
            self.xx + other.xx, self.xy + other.xy, self.yy + other.yy,
        )  # fmt: skip

    def error(self, matrix: Tensor, bias: Tensor) -> float:
        """Weighted sum of squares of y - x W - b over these rows, W [D, M], b [M]."""
        cross = (matrix * self.xy).sum() + bias @ self.y_sum
        square = ((self.xx @ matrix) * matrix).sum() + 2 * bias @ (self.x_sum @ matrix) + self.weight * bias @ bias
        return float(self.yy - 2 * cross + square)


@dataclass(frozen=True, slots=True)
class Affine:
    """y ≈ x A B + b with A [D, r], B [r, M], b [M], float64."""

    down: Tensor
    up: Tensor
    bias: Tensor

    @property
    def matrix(self) -> Tensor:
        """W = A B, [D, M]."""
        return self.down @ self.up


def fit_low_rank(moments: NormalEquations, rank: int, ridge: float) -> Affine:
    """Reduced-rank ridge regression with an intercept.

    Minimises sum_i w_i ||y_i - x_i W - b||^2 + λ ||W||_F^2 over rank(W) <= r with λ = ridge · mean diagonal of the
    centred Gram matrix.

    Args:
        moments: Of the normed input x and the update y.
        rank: r, 0 <= r <= min(D, M).
        ridge: Dimensionless penalty.

    Source: Izenman 1975; the ridge solution projected on the leading eigenvectors of W'(X'X + λ)W, that is in
        prediction space. Inferred: centring first, the penalty's scale.
    """
    mean_x, mean_y = moments.x_sum / moments.weight, moments.y_sum / moments.weight
    gram = moments.xx - moments.weight * torch.outer(mean_x, mean_x)
    cross = moments.xy - moments.weight * torch.outer(mean_x, mean_y)
    gram = gram + (ridge * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    full = torch.linalg.solve(gram, cross)
    _, vectors = torch.linalg.eigh(full.T @ cross)
    leading = vectors[:, vectors.shape[1] - rank :]
    down, up = full @ leading, leading.T
    return Affine(down, up, mean_y - mean_x @ down @ up)


def fit_with_held_out(train: NormalEquations, held_out: NormalEquations, rank: int) -> tuple[Affine, float]:
    """Choose the ridge by held-out error, then refit on everything.

    Returns:
        The map and the chosen ridge.
    """
    errors = {}
    for ridge in RIDGES:
        candidate = fit_low_rank(train, rank, ridge)
        errors[ridge] = held_out.error(candidate.matrix, candidate.bias)
    best = min(errors, key=lambda ridge: errors[ridge])
    return fit_low_rank(train.plus(held_out), rank, best), best


def as_module(affine: Affine, dtype: torch.dtype, device: torch.device) -> LowRankEmulation:
    """The map as a module of the checkpoint."""
    with torch.device("meta"):
        module = LowRankEmulation(affine.down.shape[0], affine.down.shape[1])
    tensors = {"down.weight": affine.down.T, "up.weight": affine.up.T, "up.bias": affine.bias}
    state = {name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


@torch.inference_mode()
def fit_plan(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, reporter: Reporter
) -> dict[Sublayer, nn.Module | None]:
    """Fit the emulation of every removed sublayer, first to last.

    Each fit sees the residual stream of the model as pruned and recovered so far and aims at the dense model's
    stream after the sublayer, so later adapters also mend what earlier ones missed. Tokens count by the inverse
    square of their stream's size: the next norm divides by it, and a few massive activations would otherwise
    decide everything.

    Returns:
        Sublayer -> module, None where nothing emulates it.
    """
    fitted: dict[Sublayer, nn.Module | None] = {}
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense = [hidden for hidden, _ in embedded]
    kwargs = [arguments for _, arguments in embedded]
    pruned = list(dense)
    last = max(sublayer.block for sublayer in removed)
    with reporter.progress("emulation", last + 1) as step:
        for index in range(last + 1):
            for kind in KINDS:
                sublayer = Sublayer(index, kind)
                other: dict[Kind, None] = {"ffn" if kind == "attention" else "attention": None}
                targets = [evaluator.run_block(index, h, kw[index], other) for h, kw in zip(dense, kwargs, strict=True)]
                if sublayer in removed:
                    module = _fit(pruned, targets, removed[sublayer], rank)
                    fitted[sublayer] = module
                    pruned = [h if module is None else h + module(h) for h in pruned]
                elif not fitted:
                    pruned = list(targets)
                else:
                    pruned = [
                        evaluator.run_block(index, h, kw[index], other) for h, kw in zip(pruned, kwargs, strict=True)
                    ]
                dense = targets
            step.advance()
    return fitted


def _fit(inputs: list[Tensor], targets: list[Tensor], kind: EmulationKind, rank: int) -> nn.Module | None:
    """Fit one sublayer from its inputs and the dense stream after it, lists of [b, T, D]."""
    if kind == "none":
        return None
    size = inputs[0].shape[-1]
    parts = (NormalEquations.zeros(size, size), NormalEquations.zeros(size, size))
    for number, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        update = (target - x).reshape(-1, size)
        weights = 1 / target.double().pow(2).mean(-1).reshape(-1)
        part = parts[int(number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1)]
        part.add(rms_normalise(x).reshape(-1, size), update, weights)
    dtype, device = inputs[0].dtype, inputs[0].device
    if kind == "bias":
        both = parts[0].plus(parts[1])
        module = BiasEmulation(size)
        module.bias.data = (both.y_sum / both.weight).to(device, dtype)
        return module.requires_grad_(False)
    if parts[1].weight:
        affine, _ = fit_with_held_out(parts[0], parts[1], rank)
    else:
        affine = fit_low_rank(parts[0], rank, 1e-2)
    return as_module(affine, dtype, device)
