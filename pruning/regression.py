"""Ridge and reduced-rank regression on streamed normal equations."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-2, 1e-1, 3e-1, 1.0, 3.0)
HOLD_OUT_WINDOWS = 5  # no divisor of the number of texts that calibration usually mixes


class NormalEquations:
    """Weighted moments of features x [N, D] and targets y [N, M], accumulated in a stream, float64.

    Sums grow on the device of the rows that are added and come to the CPU when they are read: once for each fit, and
    nothing waits for an accelerator before.
    """

    def __init__(self, weight: float, x_sum: Tensor, y_sum: Tensor, xx: Tensor, xy: Tensor, yy: float) -> None:
        ends = (torch.tensor(float(each), dtype=torch.float64) for each in (weight, yy))
        self._sums = [next(ends), x_sum, y_sum, xx, xy, next(ends)]

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

    @property
    def weight(self) -> float:
        """Sum of the rows' weights."""
        return float(self._on("cpu")[0])

    @property
    def x_sum(self) -> Tensor:
        """[D]."""
        return self._on("cpu")[1]

    @property
    def y_sum(self) -> Tensor:
        """[M]."""
        return self._on("cpu")[2]

    @property
    def xx(self) -> Tensor:
        """[D, D]."""
        return self._on("cpu")[3]

    @property
    def xy(self) -> Tensor:
        """[D, M]."""
        return self._on("cpu")[4]

    @property
    def yy(self) -> float:
        """Weighted sum of squares of the targets."""
        return float(self._on("cpu")[5])

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add rows x [n, D], y [n, M] with weights [n] >= 0.

        Products of float32 rows are formed in float32 (a call holds few rows) and summed over the calls in float64.
        """
        sums = self._on(x.device)
        root = weights.to(x.device, torch.promote_types(x.dtype, torch.float32)).sqrt()[:, None]
        x, y = x * root, y.to(root) * root
        with torch.autocast(x.device.type, enabled=False):
            products = x.T @ x, x.T @ y
        found = weights.to(sums[0]).sum(), (x * root).sum(0), (y * root).sum(0), *products, y.double().pow(2).sum()
        for total, part in zip(sums, found, strict=True):
            total += part  # formed in the wider of the two

    def _on(self, device: torch.device | str) -> list[Tensor]:
        """All sums, moved there."""
        if self._sums[0].device != torch.device(device):
            self._sums = [each.to(device) for each in self._sums]
        return self._sums

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

    Minimises sum_i w_i ||y_i - x_i W - b||^2 + ridge · sum_j G_jj ||W_j||^2 over rank(W) <= r, with G the centred Gram
    matrix and W_j the row of W that feature j meets.

    Args:
        moments: Of the features x and the update y.
        rank: r, 0 <= r <= min(D, M).
        ridge: Dimensionless penalty.

    Source: Izenman 1975; the ridge solution projected on the leading eigenvectors of W'(X'X + λ)W, that is in
        prediction space. Inferred: centring first, a penalty for each feature by its
        variance, which is a ridge on standardised features: streams and attention outputs differ much in scale.
    """
    mean_x, mean_y = moments.x_sum / moments.weight, moments.y_sum / moments.weight
    gram = moments.xx - moments.weight * torch.outer(mean_x, mean_x)
    cross = moments.xy - moments.weight * torch.outer(mean_x, mean_y)
    full = solve(gram, cross, ridge)
    if rank >= min(full.shape):
        rank = min(full.shape)
    _, vectors = torch.linalg.eigh(full.T @ cross)
    leading = vectors[:, vectors.shape[1] - rank :]
    down, up = full @ leading, leading.T
    return Affine(down, up, mean_y - mean_x @ down @ up)


@dataclass(frozen=True, slots=True)
class PartlyLowRank:
    """y ≈ x A B + z C + b with A [D, r], B [r, M], C [K, M], b [M], float64: of low rank in x, free in z."""

    low: Affine
    free: Tensor

    @property
    def matrix(self) -> Tensor:
        """The map of [x, z], [D + K, M]."""
        return torch.cat([self.low.matrix, self.free])


def fit_partly_low_rank(
    moments: NormalEquations, width: int, rank: int, ridge: float, *, intercept: bool = True
) -> PartlyLowRank:
    """Ridge regression on [x, z] whose map of the first `width` features has rank r at most.

    With K = [[Kxx, Kxz], [Kzx, Kzz]] the centred Gram matrix with a penalty for each feature by its variance, and Wx
    the part of x in the full solution: Wx is projected on the leading eigenvectors of Wx' (Kxx - Kxz Kzz^-1 Kzx) Wx,
    which is the best map of that rank once z has taken its share, and the map of z is solved again.

    Source: Reinsel and Velu 1998, chapter 3 (two sets of regressors). Inferred: the penalty.
    """
    weight = moments.weight
    mean_x, mean_y = (
        total / weight if intercept else torch.zeros_like(total) for total in (moments.x_sum, moments.y_sum)
    )
    gram = moments.xx - weight * torch.outer(mean_x, mean_x)
    cross = moments.xy - weight * torch.outer(mean_x, mean_y)
    gram = gram + torch.diag(_penalty(gram, ridge))
    full = torch.linalg.solve(gram, cross)[:width]
    xz, zz = gram[:width, width:], gram[width:, width:]
    remaining = gram[:width, :width] - xz @ torch.linalg.solve(zz, xz.T)
    _, vectors = torch.linalg.eigh(full.T @ remaining @ full)
    leading = vectors[:, max(0, vectors.shape[1] - rank) :]
    down, up = full @ leading, leading.T
    free = torch.linalg.solve(zz, cross[width:] - xz.T @ down @ up)
    bias = mean_y - mean_x[:width] @ down @ up - mean_x[width:] @ free
    return PartlyLowRank(Affine(down, up, bias), free)


def _penalty(gram: Tensor, ridge: float) -> Tensor:
    """On every feature by its own scale, [D]."""
    diagonal = gram.diagonal()
    return ridge * diagonal + 1e-9 * diagonal.mean() + 1e-12


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + ridge · diag(G))^-1 C for a Gram matrix G [D, D] and cross moments C [D, M], float64."""
    diagonal, penalty = gram.diagonal(), _penalty(gram, ridge)
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag(penalty))
    if info:  # rounding made it indefinite
        return torch.linalg.solve(gram + torch.diag(penalty + 1e-6 * diagonal.mean()), cross)
    return torch.cholesky_solve(cross, factor)


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


def fit_correction(
    train: NormalEquations, held_out: NormalEquations, ridges: Sequence[float] = RIDGES
) -> Tensor | None:
    """A correction of existing weights: the ridge map (no intercept) from features to what they leave unexplained.

    Returns:
        ΔW [D, M] float64, or None where it does not lower the held-out squared error.
    """
    nothing = torch.zeros_like(train.y_sum)
    errors = {ridge: held_out.error(solve(train.xx, train.xy, ridge), nothing) for ridge in ridges}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < held_out.yy:
        return None
    both = train.plus(held_out)
    return solve(both.xx, both.xy, best)


def held_out(first: int, count: int) -> Tensor:
    """Which of `count` windows, the first of which is number `first`, are held out: one in five. bool [count]."""
    return torch.arange(first, first + count) % HOLD_OUT_WINDOWS == HOLD_OUT_WINDOWS - 1


@dataclass
class HeldOutMoments:
    """Normal equations of what is fitted on and of what is held out."""

    train: NormalEquations
    held_out: NormalEquations

    @classmethod
    def zeros(cls, features: int, targets: int) -> "HeldOutMoments":
        """Empty moments for D features and M targets."""
        return cls(NormalEquations.zeros(features, targets), NormalEquations.zeros(features, targets))

    def add_windows(self, first: int, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add windows, the first of which is number `first`: x [b, T, D], y [b, T, M], weights [b, T]."""
        held = held_out(first, len(x))
        for part, rows in ((self.train, ~held), (self.held_out, held)):
            numbers = rows.nonzero()[:, 0]  # known on the CPU, so nothing waits for an accelerator
            if len(numbers):
                some, targets, each = (tensor[numbers.to(tensor.device)] for tensor in (x, y, weights))
                part.add(some.flatten(0, -2), targets.flatten(0, -2), each.flatten())

    def fitted(self, judged: bool) -> NormalEquations:
        """Moments of every row; with `judged` of those that are not held out, where any are."""
        return self.train if judged and self.held_out.weight else self.whole()

    def whole(self) -> NormalEquations:
        """Moments of every row."""
        return self.train.plus(self.held_out)

    def low_rank(self, rank: int) -> Affine:
        """The map of rank r with the penalty of least held-out error, or a fixed one where nothing was held out."""
        if self.held_out.weight:
            return fit_with_held_out(self.train, self.held_out, rank)[0]
        return fit_low_rank(self.train, rank, 1e-2)

    def partly_low_rank(self, width: int, rank: int, *, intercept: bool = True, judged: bool = False) -> PartlyLowRank:
        """`fit_partly_low_rank` with the penalty of least held-out error, or a fixed one where nothing was held out.

        Of all rows, or with `judged` of those alone that are not held out.
        """
        best = 1e-2
        if self.held_out.weight:
            errors = {}
            for ridge in RIDGES:
                one = fit_partly_low_rank(self.train, width, rank, ridge, intercept=intercept)
                errors[ridge] = self.held_out.error(one.matrix, one.low.bias)
            best = min(errors, key=lambda ridge: errors[ridge])
        return fit_partly_low_rank(self.fitted(judged), width, rank, best, intercept=intercept)

    def correction(self) -> Tensor | None:
        """`fit_correction`; None where nothing was held out to judge it."""
        return fit_correction(self.train, self.held_out) if self.held_out.weight else None


def token_weights(target: Tensor) -> Tensor:
    """Inverse mean square of each token's residual stream [..., D] -> float64 [N].

    The next norm divides by it, and a few massive activations would otherwise decide everything.
    """
    return 1 / target.double().pow(2).mean(-1).reshape(-1)
