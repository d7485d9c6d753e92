"""`kv_share` and `kv_share_low_rank`: attention over a kept layer's KV cache. The fit is in `kv_share_fit.py`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pruning.errors import RecipeError
from pruning.families import Family
from pruning.plan import Sublayer, nearest_kept_attention
from pruning.variants.base import Emulation, Job, Shape, Variant
from pruning.variants.low_rank import LOW_RANK
from pruning.variants.taps import rms_normalise


class KVShareEmulation(Emulation):
    """Attention with queries and an output map of its own over the KV cache of a kept layer: no cache of its own.

    With c = attend(q(rms(x)), K_s, V_s) the update is C c + up(down(rms(x))) + bias with full maps, and
    up(C c + down(rms(x))) + bias with q = Q2 Q1 where the maps are of low rank.

    Args:
        hidden_size: D.
        heads: H, as many as the source has.
        head_dim: d.
        sources: The one block whose keys and values it reads, before its own.
        rank: r of the query map; 0 for full query and output maps.
        own_rank: Rank of the map of the token's own input, or of the whole output map where that is of low rank.

    Source: cross-layer KV sharing (arXiv 2405.12981) between trained layers. Inferred: that it can be had without
        training, and the map of the own input beside it, since the source's values lack this layer's.
    """

    def __init__(
        self, hidden_size: int, heads: int, head_dim: int, sources: Sequence[int], rank: int, own_rank: int
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim, self.rank, self.own_rank = heads, head_dim, rank, own_rank
        self.sources: tuple[int, ...] = tuple(sources)
        if rank:
            self.query_down = nn.Linear(hidden_size, rank, bias=False)
        self.query = nn.Linear(rank or hidden_size, width, bias=True)
        self.context = nn.Linear(width, own_rank if rank else hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, own_rank, bias=False)
        self.up = nn.Linear(own_rank, hidden_size, bias=True)

    def forward(
        self, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any = None, **_: Any
    ) -> Tensor:
        """Update [b, T, D] for the residual stream [b, T, D]; the tap holds the source's keys and values."""
        normed = rms_normalise(hidden)
        query = self.query(self.query_down(normed) if self.rank else normed)
        query = query.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        mapped = self.context(self.taps[0].attend(query, position_embeddings, attention_mask))
        own = self.down(normed)
        update: Tensor = self.up(mapped + own) if self.rank else mapped + self.up(own)
        return update

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        return {
            "kind": "kv_share", "sources": list(self.sources), "heads": self.heads, "head_dim": self.head_dim,
            "rank": self.rank, "own_rank": self.own_rank,
        }  # fmt: skip

    def update(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The update [b, T, D], given what the model gives to attention."""
        found: Tensor = self(hidden, **kwargs)
        return found


class KVShare(Variant):
    """The kind: full query and output maps."""

    title = "the kv_share adapter"
    way_out = "stands in the way; prune again with --emulation low-rank and --fuse, which removes it"

    reads = frozenset({"keys", "values"})
    sees_dense = True
    full = True

    def check(self, family: Family, config: Any) -> None:
        """Refuse a family whose rotation, scale, soft cap or norm of queries is not one that it carries."""
        if not family.shares_cache:
            raise RecipeError(f"--emulation kv-share does not support {family.model_type}; use context or low-rank")

    def sources(
        self, gone: Collection[Sublayer], sublayer: Sublayer, layer_types: Sequence[str] | None, count: int
    ) -> tuple[int, ...]:
        """The nearest kept attention layer before it that sees the same window; none for an FFN."""
        kept = nearest_kept_attention(gone, sublayer.block, sublayer.block) if sublayer.kind == "attention" else ()
        alike = (block for block in kept if not layer_types or layer_types[block] == layer_types[sublayer.block])
        return tuple(alike)[:1]

    def fit(self, job: Job) -> Emulation:
        """Fit the query map to the logits and the output map to the update; a low-rank map where it has no source."""
        if not job.sources:
            return LOW_RANK.fit(job)
        from pruning.variants.kv_share_fit import fit_kv_share

        assert job.seen is not None
        return fit_kv_share(
            job.evaluator, job.sublayer, job.sources[0], job.seen, job.inputs, job.targets, job.taps, job.rank,
            full=self.full,
        )  # fmt: skip

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> KVShareEmulation:
        """The untrained module."""
        spec = entry["emulation"]
        ranks = int(spec["rank"]), int(spec["own_rank"])
        sizes = int(spec["heads"]), int(spec["head_dim"])
        return KVShareEmulation(config.hidden_size, *sizes, spec["sources"], *ranks)

    def weight_bytes(self, shape: Shape) -> int:
        """Query and output maps, a map of the own input, two biases."""
        width = shape.heads * shape.head_dim
        return ((2 * width + 2 * shape.rank + 1) * shape.hidden_size + width) * shape.dtype_bytes


class KVShareLowRank(KVShare):
    """The kind: low-rank query and output maps."""

    full = False

    def weight_bytes(self, shape: Shape) -> int:
        """The same maps, of rank r."""
        width, rank = shape.heads * shape.head_dim, shape.rank
        return ((3 * rank + 1) * shape.hidden_size + (2 * rank + 1) * width) * shape.dtype_bytes


KV_SHARE, KV_SHARE_LOW_RANK = KVShare(), KVShareLowRank()
