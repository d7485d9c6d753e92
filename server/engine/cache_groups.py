"""How the KV cache of a model with windows is cut into groups of layers, and what a request then takes of it.

vLLM 0.32 hands out blocks of one size: g layers times `block_size` tokens. It splits the layers of each type into groups
of g and gives each group blocks of its own for every request, so a type of n layers takes g * ceil(n / g) layers'
worth. For g it takes the smaller type's number of layers (the larger's within 1.5 times), which suits models that
repeat one pattern. Plans do not: 22 full and 10 limited layers waste eight full ones. Here g is what costs least for a
request as long as the longest, each further group counted as `GROUP_COST` of it: a group has block tables and attention
metadata of its own in every step.

A limited layer reserves more than its window: also the tokens of the chunks in flight (two where scheduling is
asynchronous), because blocks are freed a step late, and one block more, because a window may begin inside one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.shoal")  # vLLM's handlers, in its processes

GROUP_COST = 0.02
DRAFT = "draft_model."  # vLLM's prefix of the layers of a draft


@dataclass(frozen=True, slots=True)
class Layers:
    """Attention layers of one type.

    Attributes:
        count: How many.
        window: Positions each looks back, its own included; None: all.
    """

    count: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What decides how many blocks a request takes.

    Attributes:
        layers: By type.
        block_tokens: Tokens of one block.
        in_flight_tokens: Tokens scheduled but not yet settled, at most.
        max_model_len: Tokens of the longest request.
        together: Layers beside those that must be in one group, with full attention (a draft's); 0: none.
    """

    layers: tuple[Layers, ...]
    block_tokens: int
    in_flight_tokens: int
    max_model_len: int
    together: int = 0

    def reserved(self, window: int | None) -> int:
        """Blocks of one group that vLLM reckons the longest request with."""
        if window is None:
            return -(-self.max_model_len // self.block_tokens)
        return -(-min(window - 1 + self.in_flight_tokens, self.max_model_len) // self.block_tokens) + 1

    def blocks(self, tokens: int, window: int | None) -> int:
        """Blocks of one group that a request of so many tokens is admitted with."""
        return min(-(-tokens // self.block_tokens), self.reserved(window))

    @property
    def group_layers(self) -> int:
        """g, the layers of one group."""
        types = [(one.count, self.reserved(one.window)) for one in self.layers]
        return cheapest_group(types, (self.together, self.reserved(None)) if self.together else None)

    def layer_blocks(self, tokens: int) -> int:
        """Blocks of one layer, padding included, that a request of so many tokens is admitted with."""
        size = self.group_layers
        groups = [(-(-one.count // size), one.window) for one in self.layers] + [(self.together > 0, None)]
        return size * sum(count * self.blocks(tokens, window) for count, window in groups)


def cheapest_group(types: Sequence[tuple[int, int]], together: tuple[int, int] | None = None) -> int:
    """g, the layers of a group, that costs least; the larger one of equals.

    Args:
        types: (number of layers, blocks that a request takes of each group) of each type.
        together: The same of layers that must be in one group.
    """

    def cost(size: int) -> float:
        groups = [(-(-count // size), blocks) for count, blocks in types]
        groups += [(1, together[1])] if together else []
        taken = size * sum(count * blocks for count, blocks in groups)
        return taken * (1 + GROUP_COST * sum(count for count, _ in groups))

    most = max([count for count, _ in types] + [together[0] if together else 0])
    return min(range(together[0] if together else 1, most + 1), key=lambda size: (cost(size), -size))


def install() -> None:
    """Let vLLM in this process group the layers of checkpoints with `block_configs` as above (idempotent).

    `get_kv_cache_groups` is what every caller asks, and knows the model; the choice of g is in the middle of a function
    that it calls, which stands in for ours while such a model is asked about.
    """
    from vllm.v1.core import kv_cache_utils

    usual: Any = kv_cache_utils.get_kv_cache_groups
    if getattr(usual, "shoal", False):
        return

    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[Any]:
        if not _is_ours(vllm_config):
            groups: list[Any] = usual(vllm_config, kv_cache_spec)
            return groups
        _join_draft(kv_cache_spec)
        split: Any = kv_cache_utils._get_kv_cache_groups_uniform_page_size
        kv_cache_utils._get_kv_cache_groups_uniform_page_size = lambda specs: _groups(vllm_config, specs)
        try:
            groups = usual(vllm_config, kv_cache_spec)
        finally:
            kv_cache_utils._get_kv_cache_groups_uniform_page_size = split
        return groups

    get_kv_cache_groups.shoal = True  # type: ignore[attr-defined]
    kv_cache_utils.get_kv_cache_groups = get_kv_cache_groups


def _is_ours(vllm_config: Any) -> bool:
    speculative = vllm_config.speculative_config
    models = [vllm_config.model_config, speculative.draft_model_config if speculative else None]
    return any(getattr(model.hf_config, "block_configs", None) for model in models if model is not None)


def _join_draft(specs: dict[str, Any]) -> None:
    """Let a draft's limited layers take cache as full ones, in place: vLLM drafts from layers of one group only."""
    from vllm.v1.core import kv_cache_utils

    drafting = {name: spec for name, spec in specs.items() if name.startswith(DRAFT)}
    specs |= kv_cache_utils._promote_local_kv_cache_specs(drafting)


def _groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """Groups of layers of one page size; takes the place of vLLM's `_get_kv_cache_groups_uniform_page_size`."""
    from vllm.v1.core import kv_cache_utils

    types: list[list[str]] = []
    for name, spec in specs.items():
        for names in types:
            if name.startswith(DRAFT) == names[0].startswith(DRAFT) and _mergeable([*map(specs.get, names), spec]):
                names.append(name)
                break
        else:
            types.append([name])

    def sized(names: list[str]) -> tuple[int, int]:
        spec = specs[names[0]]
        return len(names), -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)

    drafting = [names for names in types if names[0].startswith(DRAFT)]
    size = cheapest_group(
        [sized(names) for names in types if names not in drafting], sized(drafting[0]) if drafting else None
    )
    groups: list[list[str]] = []
    for names in types:
        count = -(-len(names) // size)
        groups += [names[first::count] for first in range(count)]  # every pipeline stage has some of each
    logger.info("KV cache: groups of %d layers: %s", size, ", ".join(str(len(group)) for group in groups))
    made: list[Any] = kv_cache_utils.create_kv_cache_group_specs(specs, groups)
    return made


def _mergeable(specs: Sequence[Any]) -> bool:
    try:
        type(specs[0]).merge(specs)
    except (AssertionError, ValueError):
        return False
    return True
