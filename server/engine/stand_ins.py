"""What vLLM's blocks hold in the place of removed sublayers.

Blocks come in two kinds. A *fused* block carries (update, residual) and its norms add the two; a removed sublayer
hands the pending update on, so neither a norm nor an addition is spent on it. A *plain* block adds by itself and gets
a zero, which compiled graphs leave out.

Adapters are replicated under tensor parallelism: at rank 64 they are 2% of a block, and sharding them would cost an
all-reduce to save less than that. Those that attend are sharded by heads (`shared_attention.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pruning.errors import CheckpointError
from server.engine.variants.kv_share import KVShare
from server.engine.vllm import RMSNorm, sum_over_ranks

RMS_EPSILON = 1e-6


class Absent(nn.Module):
    """Built where a removed attention or FFN would have been; holds nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class Bias(nn.Module):
    """A constant update [D]."""

    def __init__(self, hidden_size: int, fused: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)
        self.fused = fused

    def forward(self, hidden: Tensor) -> Tensor:
        """Pending update plus bias (fused), or the bias for every token: [tokens, D]."""
        return hidden + self.bias if self.fused else self.bias.expand_as(hidden)


class Source:
    """What one kept attention layer hands on in the forward under way; a forward hook on that layer.

    Inside a compiled graph the tensor goes from the layer to its readers as any other; the last reader lets it go, so
    that the forward ends as it began.

    Args:
        partial: Whether the layer leaves the sum over tensor-parallel ranks to its block.
    """

    def __init__(self, partial: bool) -> None:
        self.partial = partial
        self.output: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        """Note the output [tokens, D]; the signature is that of a forward hook."""
        self.output = sum_over_ranks(output) if self.partial else output


class LowRank(nn.Module):
    """An affine map of rank r, as `pruning.models.modeling.LowRankEmulation` and `ContextEmulation`.

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

    def forward(self, normalised: Tensor) -> Tensor:
        """Update [tokens, D]."""
        if self.sources:
            outputs = [source.output for source in self.sources if source.output is not None]
            normalised = torch.cat([normalised, *outputs], -1)
            for source in self.last_reader_of:
                source.output = None
        return self.up(self.down(normalised))


Emulation = Bias | LowRank | KVShare


def build_emulation(spec: Mapping[str, Any] | None, hidden_size: int, fused: bool) -> Emulation | None:
    """Build what a checkpoint's `emulation` entry names; None where there is none.

    Raises:
        CheckpointError: The kind is not known.
    """
    if spec is None:
        return None
    if spec["kind"] == "bias":
        return Bias(hidden_size, fused)
    if spec["kind"] == "low_rank":
        return LowRank(hidden_size, int(spec["rank"]))
    if spec["kind"] == "context":
        return LowRank(hidden_size, int(spec["rank"]), len(spec["sources"]))
    if spec["kind"] == "kv_share":
        return KVShare(hidden_size, spec)
    raise CheckpointError(f"emulation kind {spec['kind']!r} is not known to this version of Shoal; upgrade it")


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

    def __init__(self, emulation: nn.Module | None, norm: nn.Module | None, fused: bool, share: float) -> None:
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
        update = self.emulation(given, positions) if isinstance(self.emulation, KVShare) else self.emulation(given)
        return update if self.share == 1 else update * self.share


class Place(NamedTuple):
    """Attributes of a block: a sublayer's module, and the norms of its own before and after it."""

    module: str
    before: str | None
    after: str | None


def install(block: nn.Module, place: Place, emulation: Emulation | None, *, fused: bool, share: float) -> None:
    """Put the stand-in of a removed sublayer, and what its norms become, into a block."""
    norm: nn.Module | None = None
    if isinstance(emulation, LowRank | KVShare):
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
    sources: dict[int, Source] = {}
    last: dict[int, LowRank] = {}
    for index in range(start, end):
        for kind, place in zip(("attention", "ffn"), places, strict=True):
            spec = block_configs[index][kind]["emulation"]
            if spec is None or not spec.get("sources"):
                continue
            emulation = getattr(blocks[index], place).emulation
            if isinstance(emulation, KVShare):
                (source,) = spec["sources"]
                attention = getattr(blocks[source], places[0])
                name = attention.attn.layer_name.replace(f".{source}.", f".{index}.", 1)
                emulation.connect(attention, name)
                continue
            for source in spec["sources"]:
                if source not in sources:
                    sources[source] = Source(partial)
                    getattr(blocks[source], places[0]).register_forward_hook(sources[source])
                emulation.sources.append(sources[source])
                last[source] = emulation
    for source, emulation in last.items():
        emulation.last_reader_of.append(sources[source])
