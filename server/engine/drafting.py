"""Attention metadata of a draft whose layers differ in heads.

vLLM 0.32 drafts with one set of metadata for all layers of a draft that have the same backend, sized by the first of
them. It also holds how the heads are shared out among threads, so layers with other heads need their own.
"""

from collections import defaultdict
from typing import Any


def part_metadata() -> None:
    """Let drafts in this process have metadata for each number of heads and each cache spec (idempotent)."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.utils import AttentionGroup

    usual: Any = SpecDecodeBaseProposer.initialize_attn_backend
    if getattr(usual, "shoal", False):
        return

    def initialize_attn_backend(self: Any, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        usual(self, kv_cache_config, kernel_block_sizes)
        made: list[Any] = []
        for group in self.draft_attn_groups:
            whole = kv_cache_config.kv_cache_groups[group.kv_cache_group_id].kv_cache_spec
            layers = get_layers_from_vllm_config(self.vllm_config, Attention, group.layer_names)
            alike: dict[Any, list[str]] = defaultdict(list)
            for name in group.layer_names:
                spec = whole.kv_cache_specs[name] if isinstance(whole, UniformTypeKVCacheSpecs) else whole
                alike[spec, layers[name].num_heads].append(name)
            if len(alike) == 1:
                made.append(group)
                continue
            for (spec, _), names in alike.items():
                one = AttentionGroup(group.backend, names, spec, group.kv_cache_group_id)
                size = kernel_block_sizes[group.kv_cache_group_id] if kernel_block_sizes else None
                one.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=size)
                made.append(one)
        self.draft_attn_groups = made

    initialize_attn_backend.shoal = True  # type: ignore[attr-defined]
    SpecDecodeBaseProposer.initialize_attn_backend = initialize_attn_backend
