"""`bias`: a constant update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.variants.base import Emulation, Job, Shape, Variant
from pruning.variants.low_rank import moments_of


class BiasEmulation(Emulation):
    """A constant update [D]: the mean of what the sublayer added (arXiv 2407.16286, emulated update)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Update that broadcasts over [..., D]."""
        return self.bias

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        return {"kind": "bias"}


class Bias(Variant):
    """The kind."""

    title = "the bias adapter"

    def fit(self, job: Job) -> BiasEmulation:
        """The weighted mean of the update."""
        both = moments_of(job).whole()
        module = BiasEmulation(job.inputs[0].shape[-1])
        module.bias.data = (both.y_sum / both.weight).to(job.inputs[0])
        module.requires_grad_(False)
        return module

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> BiasEmulation:
        """The untrained module."""
        return BiasEmulation(config.hidden_size)

    def weight_bytes(self, shape: Shape) -> int:
        """D numbers."""
        return shape.hidden_size * shape.dtype_bytes

    def rank_when_fused(self, rank: int, hidden_size: int) -> int:
        """A constant."""
        return 0


BIAS = Bias()
