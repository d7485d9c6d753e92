"""The baseline any metric must beat."""

from collections.abc import Sequence

import torch

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling, Scores
from pruning.plan import Unit


def random(evaluator: Evaluator, units: Sequence[Unit], sampling: Sampling, reporter: Reporter) -> Scores:
    """Seeded uniform values in [0, 1)."""
    generator = torch.Generator().manual_seed(sampling.seed)
    values = torch.rand(len(units), generator=generator, dtype=torch.float64)
    return Scores(dict(zip(units, values.tolist(), strict=True)))
