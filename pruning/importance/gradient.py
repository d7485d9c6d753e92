"""Metrics from gradients of the loss by a gate g on every sublayer's update: x + g f(x)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.console import Reporter, Step
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.forward.gates import each_sublayer_gradients
from pruning.importance import Sampling, Scores
from pruning.plan import KINDS, Unit


def taylor(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over windows of |dL/dg| at g = 1, the first-order change of each window's loss, nats/token.

    Source: arXiv 1906.10771 (gates, first order). Inferred: the absolute value for each window, since the signed mean
        is near zero for a trained model.
    """
    with reporter.progress("gradients", len(evaluator.mine())) as step:
        return _of(units, _gradients(evaluator, 1.0, units, step).abs().mean(0))


def aumann_shapley(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean of -dL/dg on the straight path of all gates from 1 to the target depth, times the path's length.

    With n units of which d will go, the path ends where every gate is 1 - d/n; the integral is a Gauss-Legendre sum
    of `samples` points. Over the whole path the values times d/n sum to the loss there minus the dense loss.

    Source: Aumann and Shapley, Values of Non-Atomic Games, 1974; integrated gradients, arXiv 1703.01365. Inferred:
        the path, which keeps sublayers exchangeable.
    """
    share = min(1.0, sampling.depth / len(units))
    nodes, weights = _gauss_legendre(sampling.samples)
    with reporter.progress("gradients on the path", sampling.samples * len(evaluator.mine())) as step:
        rows = [_gradients(evaluator, 1 - share * node, units, step) for node in nodes]
    mean = sum(weight * row.mean(0) for weight, row in zip(weights, rows, strict=True))
    assert isinstance(mean, Tensor)
    return _of(units, -mean)


def _gradients(evaluator: Evaluator, gate: float, units: Sequence[Unit], step: Step) -> Tensor:
    """Gradient of every window's loss with the units' gates at one value, all others 1; float64 [n, L, 2]."""
    gates = torch.ones(len(evaluator.blocks), len(KINDS))
    for unit in units:
        for sublayer in unit.sublayers:
            gates[sublayer.block, KINDS.index(sublayer.kind)] = gate
    table = torch.zeros(evaluator.windows, *gates.shape, dtype=torch.float64)
    for number, part in each_sublayer_gradients(evaluator, gates):
        table[evaluator.span(number)] = part
        step.advance()
    return parallel.gather(table)


def _of(units: Sequence[Unit], table: Tensor) -> Scores:
    """Sum of each unit's gates in a table [L, 2]."""
    return Scores({u: sum(float(table[s.block, KINDS.index(s.kind)]) for s in u.sublayers) for u in units})


def _gauss_legendre(points: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [0, 1]."""
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(points)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
