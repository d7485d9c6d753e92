import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning.regression import NormalEquations, fit_correction, fit_low_rank

seeds = st.integers(0, 2**16)


def rows(seed: int, count: int = 64, features: int = 6, targets: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64) + 1
    y = x @ torch.randn(features, targets, generator=generator, dtype=torch.float64)
    y = y + torch.randn(count, targets, generator=generator, dtype=torch.float64)
    return x, y, torch.rand(count, generator=generator, dtype=torch.float64) + 0.1


def moments_of(x: Tensor, y: Tensor, weights: Tensor, chunk: int = 1000) -> NormalEquations:
    moments = NormalEquations.zeros(x.shape[1], y.shape[1])
    for part in zip(x.split(chunk), y.split(chunk), weights.split(chunk), strict=True):
        moments.add(*part)
    return moments


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 63))
def test_streamed_moments_equal_those_in_memory(seed: int, chunk: int) -> None:
    x, y, weights = rows(seed)
    whole, streamed = moments_of(x, y, weights), moments_of(x, y, weights, chunk)
    for name in ("weight", "x_sum", "y_sum", "xx", "xy", "yy"):
        torch.testing.assert_close(torch.as_tensor(getattr(streamed, name)), torch.as_tensor(getattr(whole, name)))


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 5))
def test_no_map_of_the_same_rank_is_better(seed: int, rank: int) -> None:
    x, y, weights = rows(seed)
    moments = moments_of(x, y, weights)
    best = fit_low_rank(moments, rank, 0.0)
    error = moments.error(best.matrix, best.bias)
    residual = y - x @ best.matrix - best.bias
    assert error == pytest.approx(float((weights[:, None] * residual**2).sum()), rel=1e-6)
    generator = torch.Generator().manual_seed(seed + 1)
    for scale in (0.01, 0.1, 1.0):
        down = best.down + scale * torch.randn(best.down.shape, generator=generator, dtype=torch.float64)
        up = best.up + scale * torch.randn(best.up.shape, generator=generator, dtype=torch.float64)
        bias = (moments.y_sum - moments.x_sum @ down @ up) / moments.weight
        assert moments.error(down @ up, bias) >= error * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_higher_rank_is_never_worse_on_the_rows_it_was_fitted_on(seed: int) -> None:
    moments = moments_of(*rows(seed))
    maps = [fit_low_rank(moments, rank, 0.0) for rank in range(6)]
    errors = [moments.error(affine.matrix, affine.bias) for affine in maps]
    assert all(higher <= lower * (1 + 1e-9) for lower, higher in itertools.pairwise(errors))


def test_an_affine_relation_is_recovered() -> None:
    x, _, weights = rows(0)
    matrix, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    affine = fit_low_rank(moments_of(x, x @ matrix + bias, weights), 5, 0.0)
    torch.testing.assert_close(affine.matrix, matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(affine.bias, bias, rtol=1e-5, atol=1e-5)


def test_a_correction_is_taken_only_where_it_helps_held_out_rows() -> None:
    x, y, weights = rows(0, 512)
    found = fit_correction(moments_of(x[:400], y[:400], weights[:400]), moments_of(x[400:], y[400:], weights[400:]))
    assert found is not None
    noise = torch.randn(512, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise[400:] -= 10 * (x[400:] @ torch.linalg.lstsq(x[:400], noise[:400]).solution)
    train, held_out = moments_of(x[:400], noise[:400], weights[:400]), moments_of(x[400:], noise[400:], weights[400:])
    assert fit_correction(train, held_out) is None
