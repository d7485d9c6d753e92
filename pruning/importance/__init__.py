"""Importance metrics: one table, targets imported when used. High importance means: keep."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

from pruning.errors import RecipeError
from pruning.plan import Unit


@dataclass(frozen=True, slots=True)
class Sampling:
    """How metrics that draw subnetworks draw them.

    Attributes:
        seed: Of everything drawn.
        samples: Subnetworks, pairs of orders, or points of a path.
        depth: Units that will be removed: how deep sampled subnetworks and paths go.
    """

    seed: int = 0
    samples: int = 8
    depth: int = 1


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of every unit, and its standard error where the metric has one."""

    values: dict[Unit, float]
    errors: dict[Unit, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score units.

    Attributes:
        target: `module:function`, called with (evaluator, units, sampling, reporter) -> Scores.
        cost: Work in forwards of the model; U units, S samples, L/2 because prefixes are shared.
        unit: Unit of the values.
        source: Where it comes from.
        help: One line.
        draws: The work grows with `Sampling.samples`.
        apart: A unit's value does not depend on which others are scored, and each costs forwards of its own.
    """

    target: str
    cost: str
    unit: str
    source: str
    help: str
    draws: bool = False
    apart: bool = False

    def load(self) -> Callable[..., Scores]:
        """Import the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


METRICS: dict[str, Metric] = {
    "cosine": Metric(
        "pruning.importance.activation:cosine", "1", "1 - cos", "arXiv 2403.03853",
        "1 - cosine of the residual stream before and after",
    ),
    "l1": Metric(
        "pruning.importance.activation:l1", "1", "L1 norm", "arXiv 2407.16286", "L1 norm of what is added to the stream"
    ),
    "l2": Metric(
        "pruning.importance.activation:l2", "1", "L2 norm", "arXiv 2407.16286", "L2 norm of what is added to the stream"
    ),
    "relative-l1": Metric(
        "pruning.importance.activation:relative_l1", "1", "ratio", "arXiv 2310.05015",
        "L1 norm of what is added, over that of the stream before it",
    ),
    "relative-l2": Metric(
        "pruning.importance.activation:relative_l2", "1", "ratio", "arXiv 2310.05015",
        "L2 norm of what is added, over that of the stream before it",
    ),
    "angular": Metric(
        "pruning.importance.activation:angular", "1", "half turns", "arXiv 2403.17887",
        "angle between the stream before and after; over n blocks with --search consecutive",
    ),
    "bip": Metric(
        "pruning.importance.activation:bip", "1", "L2 norm", "arXiv 2412.06419",
        "bound on the change of the block's output",
    ),
    "leave-one-out": Metric(
        "pruning.importance.ablation:leave_one_out", "U/2", "nats/token", "arXiv 2407.16286",
        "increase of the next-token loss when the unit alone is removed", apart=True,
    ),
    "perplexity": Metric(
        "pruning.importance.ablation:perplexity", "U/2", "perplexity", "arXiv 2406.10594",
        "increase of the perplexity when the unit alone is removed", apart=True,
    ),
    "kl": Metric(
        "pruning.importance.ablation:kl", "U/2", "nats/token", "arXiv 2410.14649",
        "KL from the dense model's next-token distribution when the unit alone is removed", apart=True,
    ),
    "loss-shapley": Metric(
        "pruning.importance.ablation:loss_shapley", "S", "nats/token", "arXiv 2407.16286",
        "loss of sampled subnetworks without the unit minus with it", draws=True,
    ),
    "logit-shapley": Metric(
        "pruning.importance.ablation:logit_shapley", "S", "logit distance", "arXiv 2407.16286",
        "distance to the dense logits of sampled subnetworks without the unit minus with it", draws=True,
    ),
    "task-shapley": Metric(
        "pruning.importance.ablation:task_shapley", "S", "per question", "arXiv 2407.16286",
        "loss or error on --task questions of sampled subnetworks without the unit minus with it", draws=True,
    ),
    "shapley": Metric(
        "pruning.importance.ablation:shapley", "2 S U", "nats/token", "arXiv 1904.02868",
        "Shapley value of the loss from antithetic orders of removal, truncated", draws=True,
    ),
    "taylor": Metric(
        "pruning.importance.gradient:taylor", "3", "nats/token", "arXiv 1906.10771",
        "first-order estimate of the loss increase from gates on the sublayers",
    ),
    "aumann-shapley": Metric(
        "pruning.importance.gradient:aumann_shapley", "3 S", "nats/token", "Aumann and Shapley 1974",
        "gate gradients integrated on the way from the dense model to the target depth", draws=True,
    ),
    "random": Metric(
        "pruning.importance.random:random", "0", "none", "baseline", "seeded uniform values, for comparison"
    ),
}  # fmt: skip


def metric(name: str) -> Metric:
    """Look a metric up.

    Raises:
        RecipeError: Unknown, with the nearest known name.
    """
    if name in METRICS:
        return METRICS[name]
    near = get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"unknown importance metric {name!r}; {hint}known: {', '.join(METRICS)}")
