"""What vLLM's blocks hold in the place of removed sublayers.

Blocks come in two kinds. A *fused* block carries (update, residual) and its norms add the two; a removed sublayer
hands the pending update on, so neither a norm nor an addition is spent on it. A *plain* block adds by itself and gets
a zero, which compiled graphs leave out.

Adapters are replicated under tensor parallelism: at rank 64 they are 2% of a block, and sharding them would cost an
all-reduce to save less than that. Those that attend are sharded by heads. What each kind computes is in `variants/`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from server.engine import variants
from server.engine.variants.interface import Emulation, Stage
from server.engine.vllm import RMSNorm

RMS_EPSILON = 1e-6


class Absent(nn.Module):
    """Built where a removed attention or FFN would have been; holds nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def build_emulation(spec: Mapping[str, Any] | None, hidden_size: int, fused: bool) -> Emulation | None:
    """Build what a checkpoint's `emulation` entry names; None where there is none.

    Raises:
        CheckpointError: The kind is not known.
    """
    if spec is None:
        return None
    emulation: Emulation = variants.stand_in(spec).build(spec, hidden_size, fused)
    return emulation


class SkippedNorm(nn.Module):
    """Norm before a sublayer that does not read its input: hands the pending update on."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """(update, residual) as they came; in block 0 of a fused model nothing is pending yet."""
        if residual is not None:
            return hidden, residual
        return torch.zeros_like(hidden) if self.fused else hidden


class StandIn(nn.Module):
    """Takes the place of a removed attention or FFN module.

    Args:
        emulation: Makes the update; None where there is none.
        norm: Before the emulation, where the block does not hold it in the place of the sublayer's own.
        fused: Whether blocks carry (update, residual).
        share: Of the update that this rank adds, where the block sums over ranks.
    """

    def __init__(self, emulation: Emulation | None, norm: nn.Module | None, fused: bool, share: float) -> None:
        super().__init__()
        self.emulation = emulation
        self.norm = norm
        self.fused = fused
        self.share = share

    def forward(self, hidden_states: Tensor, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The update [tokens, D]; without emulation the pending one (fused) or zero."""
        if self.emulation is None:
            return hidden_states if self.fused else torch.zeros_like(hidden_states)
        given = hidden_states if self.norm is None else self.norm(hidden_states)
        update: Tensor = self.emulation(given, positions)
        return update if self.share == 1 else update * self.share


class Place(NamedTuple):
    """Attributes of a block: a sublayer's module, and the norms of its own before and after it."""

    module: str
    before: str | None
    after: str | None


def install(block: nn.Module, place: Place, emulation: Emulation | None, *, fused: bool, share: float) -> None:
    """Put the stand-in of a removed sublayer, and what its norms become, into a block."""
    norm: nn.Module | None = None
    if emulation is not None and emulation.reads_norm:
        norm = RMSNorm(emulation.hidden_size, eps=RMS_EPSILON, has_weight=False)
    if place.before is not None:
        setattr(block, place.before, norm or SkippedNorm(fused))
        norm = None
    if place.after is not None:
        setattr(block, place.after, nn.Identity())
    setattr(block, place.module, StandIn(emulation, norm, fused, share))


def connect_sources(
    blocks: nn.ModuleList,
    block_configs: Sequence[Any],
    places: tuple[str, str],
    start: int,
    end: int,
    *,
    partial: bool,
) -> None:
    """Let emulations of one pipeline stage read the attention layers they name, or those layers' KV caches.

    Args:
        blocks: All, of which this stage holds some.
        block_configs: One entry a block.
        places: Attributes of a block that hold attention and FFN.
        start: First block of the stage.
        end: One past its last.
        partial: Whether attention leaves the sum over tensor-parallel ranks to its block.
    """
    stage = Stage(blocks, places[0], partial=partial)
    for index in range(start, end):
        for kind, place in zip(("attention", "ffn"), places, strict=True):
            entry = block_configs[index][kind]
            if entry["no_op"] and entry["emulation"] is not None:
                getattr(blocks[index], place).emulation.connect(stage, index, entry["emulation"])
    stage.close()
