"""The baseline any metric must beat."""

from collections.abc import Callable, Sequence

import torch

from pruning.plan import Sublayer
from pruning.subnetwork import Evaluator


def random(
    evaluator: Evaluator, sublayers: Sequence[Sublayer], seed: int, advance: Callable[[], None]
) -> dict[Sublayer, float]:
    """Seeded uniform values in [0, 1)."""
    values = torch.rand(len(sublayers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dict(zip(sublayers, values.tolist(), strict=True))
