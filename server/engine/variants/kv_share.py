"""Attention over the KV cache of another layer in vLLM: the stand-in of a removed layer that costs no cache."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from server.engine.variants.interface import Emulation, Stage, StandInVariant
from server.engine.vllm import ColumnParallelLinear, RowParallelLinear, attention_over


class KVShare(Emulation):
    """Queries and an output map over another layer's cache, as `pruning.variants.kv_share.KVShareEmulation`.

    Full matrices are sharded by heads under tensor parallelism, as those of ordinary attention. Of low-rank maps the
    sides that face the heads are; the others, and the map of the own input, are replicated.

    Args:
        hidden_size: D.
        spec: The checkpoint's `emulation` entry.
    """

    def __init__(self, hidden_size: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        rank, own_rank, width = int(spec["rank"]), int(spec["own_rank"]), int(spec["heads"]) * int(spec["head_dim"])
        self.hidden_size, self.rank = hidden_size, rank
        if rank:
            self.query_down = nn.Linear(hidden_size, rank, bias=False)
        self.query = ColumnParallelLinear(rank or hidden_size, width, bias=True)
        self.context = RowParallelLinear(width, own_rank if rank else hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, own_rank, bias=False)
        self.up = nn.Linear(own_rank, hidden_size, bias=True)

    def connect(self, stage: Stage, block: int, spec: Mapping[str, Any]) -> None:
        """Attend to the cache of the attention layer that the entry names, with its rotation."""
        (source,) = spec["sources"]
        attention = stage.attention(source)
        self.rotary = attention.rotary_emb
        name = attention.attn.layer_name.replace(f".{source}.", f".{block}.", 1)
        self.attention = attention_over(attention.attn, name)

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Update [tokens, D]."""
        query, _ = self.query(self.query_down(hidden) if self.rank else hidden)
        query, _ = self.rotary(positions, query, None)
        contexts = self.attention(query, None, None)
        mapped, _ = self.context(contexts)
        own = self.down(hidden)
        update: Tensor = self.up(mapped + own) if self.rank else mapped + self.up(own)
        return update


VARIANT = StandInVariant(lambda spec, hidden_size, fused: KVShare(hidden_size, spec), reads="KV cache")
