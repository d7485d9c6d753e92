"""Importance metrics: one table, targets imported when used. High importance means: keep."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pruning.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score sublayers.

    Attributes:
        target: `module:function`, called with (evaluator, sublayers, seed, advance) -> {sublayer: value}.
        cost: Work in forwards of the model.
        unit: Unit of the values.
        source: Where it comes from.
        help: One line.
    """

    target: str
    cost: str
    unit: str
    source: str
    help: str

    def load(self) -> Callable[..., dict[Any, float]]:
        """Import the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


METRICS: dict[str, Metric] = {
    "cosine": Metric(
        "pruning.importance.activation:cosine", "1 forward", "1 - cos", "arXiv 2403.03853",
        "1 - cosine of the residual stream before and after the sublayer",
    ),
    "leave-one-out": Metric(
        "pruning.importance.ablation:leave_one_out", "L/2 forwards", "nats/token", "arXiv 2407.16286",
        "increase of the next-token loss when the sublayer alone is removed",
    ),
    "random": Metric(
        "pruning.importance.random:random", "none", "none", "baseline", "seeded uniform values, for comparison",
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
