"""Attention over the KV cache of another layer in vLLM: the stand-in of a removed layer that costs no cache."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from server.engine.vllm import ColumnParallelLinear, RowParallelLinear, attention_over


class KVShare(nn.Module):
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

    def connect(self, source: nn.Module, name: str) -> None:
        """Attend to the cache of this attention module from now on.

        Args:
            source: vLLM's attention module of an earlier block, with its rotation.
            name: Of the new attention layer, such as `model.layers.4.self_attn.attn`.
        """
        self.rotary = source.rotary_emb
        self.attention = attention_over(source.attn, name)

    def forward(self, normalised: Tensor, positions: Tensor) -> Tensor:
        """Update [tokens, D]."""
        query, _ = self.query(self.query_down(normalised) if self.rank else normalised)
        query, _ = self.rotary(positions, query, None)
        contexts = self.attention(query, None, None)
        mapped, _ = self.context(contexts)
        own = self.down(normalised)
        update: Tensor = self.up(mapped + own) if self.rank else mapped + self.up(own)
        return update
