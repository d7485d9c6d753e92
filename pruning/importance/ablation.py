"""Metrics that remove units and watch what the model then predicts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Objective
from pruning.importance import Sampling, Scores
from pruning.importance.shapley import Estimate, Game, permutation_shapley, sampled_contributions
from pruning.plan import Unit, sublayers_of

TRUNCATION = 0.02


def leave_one_out(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Loss without the unit minus loss with it, nats/token.

    Source: arXiv 2407.16286, the leave-one-out case of the loss Shapley value.
    """
    table = _without_each(evaluator, units, "loss", reporter)
    differences = table[1:] - table[0]
    errors = differences.std(1) / differences.shape[1] ** 0.5 if differences.shape[1] > 1 else None
    return _scores(units, differences.mean(1), errors)


def perplexity(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Perplexity without the unit minus perplexity with it; the order is leave-one-out's.

    Source: BlockPruner, arXiv 2406.10594.
    """
    table = _without_each(evaluator, units, "loss", reporter).mean(1).exp()
    return _scores(units, table[1:] - table[0])


def kl(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean over tokens of KL(dense || without the unit), minus that with it (0 in the dense model), nats/token.

    Source: the fitness of EvoPress, arXiv 2410.14649, on one unit at a time.
    """
    table = _without_each(evaluator, units, "kl", reporter).mean(1)
    return _scores(units, table[1:] - table[0])


def loss_shapley(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Mean loss of sampled subnetworks that lack the unit, minus that of those that have it, nats/token.

    Source: arXiv 2407.16286; see `shapley.sampled_contributions`.
    """
    return _sampled(evaluator, units, "loss", sampling, reporter)


def logit_shapley(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """As `loss_shapley`, by the L2 distance of the logits to the dense model's.

    Source: arXiv 2407.16286; see `shapley.sampled_contributions`.
    """
    return _sampled(evaluator, units, "logits", sampling, reporter)


def task_shapley(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """As `loss_shapley`, by the loss or the zero-one error on multiple-choice questions.

    Raises:
        RecipeError: There are no questions.

    Source: arXiv 2407.16286 (the task performance Shapley value); see `shapley.sampled_contributions`.
    """
    if not evaluator.answers_questions:
        raise RecipeError("--importance task-shapley needs --task FILE with multiple-choice questions")
    return _sampled(evaluator, units, "loss", sampling, reporter)


def shapley(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Shapley value of the loss, nats/token, with its standard error.

    Source: arXiv 1904.02868, arXiv 2104.12199; see `shapley.permutation_shapley`.
    """
    orders = 2 * sampling.samples
    with reporter.progress("Shapley values", (orders * len(units) + 2) * len(evaluator.mine())) as step:
        game = _game(evaluator, units, "loss", step.advance)
        generator = torch.Generator().manual_seed(sampling.seed)
        estimate = permutation_shapley(game, len(units), sampling.samples, generator, TRUNCATION)
    return _estimated(units, estimate)


def _sampled(
    evaluator: Evaluator, units: Sequence[Unit], objective: Objective, sampling: Sampling, reporter: Reporter
) -> Scores:
    subnetworks = sampling.samples * len(units)
    with reporter.progress("sampled subnetworks", subnetworks * len(evaluator.mine())) as step:
        game = _game(evaluator, units, objective, step.advance)
        generator = torch.Generator().manual_seed(sampling.seed)
        return _estimated(units, sampled_contributions(game, len(units), subnetworks, sampling.depth, generator))


def _game(evaluator: Evaluator, units: Sequence[Unit], objective: Objective, advance) -> Game:  # type: ignore[no-untyped-def]
    """The cost of removing the units of each set."""

    def cost(sets: Sequence[frozenset[int]]) -> Tensor:
        plans = [dict.fromkeys(sublayers_of(units[player] for player in gone)) for gone in sets]
        return evaluator.values(plans, objective, advance).mean(1)

    return cost


def _without_each(evaluator: Evaluator, units: Sequence[Unit], objective: Objective, reporter: Reporter) -> Tensor:
    """Row 0: as it is; row 1 + i: without unit i; float64 [1 + units, windows]."""
    plans = [{}, *(dict.fromkeys(unit.sublayers) for unit in units)]
    with reporter.progress("leave one out", len(plans) * len(evaluator.mine())) as step:
        return evaluator.values(plans, objective, step.advance)


def _estimated(units: Sequence[Unit], estimate: Estimate) -> Scores:
    return _scores(units, estimate.values, estimate.errors)


def _scores(units: Sequence[Unit], values: Tensor, errors: Tensor | None = None) -> Scores:
    known = {} if errors is None else dict(zip(units, errors.tolist(), strict=True))
    return Scores(dict(zip(units, values.tolist(), strict=True)), known)
