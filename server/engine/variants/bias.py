"""A constant update in vLLM, as `pruning.models.modeling.BiasEmulation`."""

import torch
from torch import Tensor, nn

from server.engine.variants.interface import Emulation, StandInVariant


class Bias(Emulation):
    """A constant update [D].

    Args:
        hidden_size: D.
        fused: Whether blocks carry (update, residual).
    """

    reads_norm = False

    def __init__(self, hidden_size: int, fused: bool) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)
        self.fused = fused

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Pending update plus bias (fused), or the bias for every token: [tokens, D]."""
        return hidden + self.bias if self.fused else self.bias.expand_as(hidden)


VARIANT = StandInVariant(lambda spec, hidden_size, fused: Bias(hidden_size, fused))
