"""An affine map of rank r in vLLM, as `pruning.models.modeling.LowRankEmulation` and `ContextEmulation`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.variants.interface import Emulation, Source, Stage, StandInVariant


class LowRank(Emulation):
    """up(down([x, c_1, ..., c_k])) + bias of the normalised stream x and k attention layers' outputs.

    Args:
        hidden_size: D.
        rank: r.
        sources: k, attention layers whose outputs it reads beside the stream.
    """

    def __init__(self, hidden_size: int, rank: int, sources: int = 0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.down = nn.Linear(hidden_size * (1 + sources), rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=True)
        self.sources: list[Source] = []
        self.last_reader_of: list[Source] = []

    def connect(self, stage: Stage, block: int, spec: Mapping[str, Any]) -> None:
        """Read the outputs of the attention layers that the entry names."""
        self.sources = [stage.output_of(source, self.last_reader_of) for source in spec.get("sources", ())]

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Update [tokens, D]."""
        if self.sources:
            outputs = [source.output for source in self.sources if source.output is not None]
            hidden = torch.cat([hidden, *outputs], -1)
            for source in self.last_reader_of:
                source.output = None
        update: Tensor = self.up(self.down(hidden))
        return update


VARIANT = StandInVariant(
    lambda spec, hidden_size, fused: LowRank(hidden_size, int(spec["rank"]), len(spec.get("sources", ())))
)
