"""`context`: a low-rank map that also reads what kept attention layers put out."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning.plan import Sublayer, nearest_kept_attention
from pruning.variants.base import Emulation, Job, Shape, Variant
from pruning.variants.low_rank import LowRankEmulation, load_affine, low_rank_module, moments_of
from pruning.variants.taps import context_features


class ContextEmulation(Emulation):
    """A map of rank r of the normalised residual stream and what kept attention layers before it put out.

    up(down([rms(x), c_1, ..., c_k])) + bias. A per-token map cannot look at other tokens; the outputs of attention
    layers that stay carry context at no cost in KV cache.

    Args:
        hidden_size: D.
        rank: r.
        sources: Blocks whose attention it reads, k of them, all before its own.

    Source: inferred; a closed-form linear map in place of a layer (ReplaceMe, arXiv 2505.02819) with further
        regressors.
    """

    def __init__(self, hidden_size: int, rank: int, sources: Sequence[int]) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.down = nn.Linear(hidden_size * (1 + len(self.sources)), rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Update [..., D] for the residual stream [..., D]; the taps hold the sources' outputs."""
        return self.up(self.down(self.features(hidden)))

    def features(self, hidden: Tensor) -> Tensor:
        """What the map reads, [..., D (1+k)]; a source that put nothing out counts as zero."""
        return context_features(hidden, [tap.output for tap in self.taps])

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        return {"kind": "context", "rank": self.down.out_features, "sources": list(self.sources)}


class Context(Variant):
    """The kind."""

    title = "the context adapter"
    way_out = "stands in the way; prune again with --emulation low-rank and --fuse, which removes it"

    def sources(
        self, gone: Collection[Sublayer], sublayer: Sublayer, layer_types: Sequence[str] | None, count: int
    ) -> tuple[int, ...]:
        """The nearest kept attention layers before it."""
        return nearest_kept_attention(gone, sublayer.block, count)

    def fit(self, job: Job) -> ContextEmulation | LowRankEmulation:
        """Reduced-rank ridge regression on the stream and the sources; where there are none, on the stream alone."""
        affine = moments_of(job).low_rank(job.rank)
        if not job.sources:
            return low_rank_module(affine, job.inputs[0])
        with torch.device("meta"):
            module = ContextEmulation(affine.up.shape[1], affine.down.shape[1], job.sources)
        load_affine(module, affine, job.inputs[0])
        return module

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> ContextEmulation:
        """The untrained module."""
        spec = entry["emulation"]
        return ContextEmulation(config.hidden_size, int(spec["rank"]), spec["sources"])

    def weight_bytes(self, shape: Shape) -> int:
        """A wide and a narrow matrix, and a bias."""
        return ((2 + shape.sources) * shape.rank + 1) * shape.hidden_size * shape.dtype_bytes


CONTEXT = Context()
