"""How the KV cache of a model with windows is cut into groups of layers, and what a request then takes of it.

vLLM 0.32 hands out blocks of one size: g layers times `block_size` tokens. It splits the layers of each type into
groups of g and gives each group blocks of its own for every request, so a type of n layers takes g * ceil(n / g)
layers' worth. For g it takes the smaller type's number of layers (the larger's within 1.5 times), which suits models
that repeat one pattern. Plans do not: 22 full and 10 limited layers waste eight full ones. Here g is what costs least
for a request as long as the longest, each further group counted as `GROUP_COST` of it: a group has block tables and
attention metadata of its own in every step (measured: 0.2 ms for 8 requests on a CPU).

A limited layer reserves more than its window: also the tokens of the chunks in flight (two where scheduling is
asynchronous), because blocks are freed a step late, and one block more, because a window may begin inside one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pruning.variants import positions_of

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

    def held(self, tokens: int) -> int:
        """Tokens of one layer, summed over the layers, that a request of so many tokens holds between its steps.

        What a plan counts: no padding, no part of a block, nothing in flight.
        """
        together = self.together * tokens
        return together + sum(one.count * min(tokens, one.window or tokens) for one in self.layers)

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


def shape_of(vllm_config: Any) -> CacheShape:
    """The shape of a running engine's cache, of all pipeline stages together."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    windows = _windows(model.hf_text_config, cache.sliding_window, model.max_model_len)
    drafting = 0
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.method == "draft_model":
        draft = vllm_config.speculative_config.draft_model_config.hf_text_config
        drafting = len(_windows(draft, None, model.max_model_len))
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and None in windows:
        windows = [None] * len(windows)
    if set(windows) == {None}:  # one type only: one group
        windows, drafting = [None] * (len(windows) + drafting), 0
    return _shape(vllm_config, windows, drafting)


def dense_shape_of(vllm_config: Any) -> CacheShape:
    """The same of the dense model, without a draft."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    layers = getattr(model.hf_text_config, "block_configs", None) or [None] * model.hf_text_config.num_hidden_layers
    return _shape(vllm_config, _own_windows(model.hf_text_config, len(layers), cache.sliding_window))


def windows_of(config: Any) -> dict[int, int]:
    """Block -> W, of the layers that a model's configuration limits."""
    entries = [block["attention"] for block in getattr(config, "block_configs", None) or ()]
    found = {block: positions_of(entry) for block, entry in enumerate(entries)}
    return {block: size for block, size in found.items() if size is not None}


def _shape(vllm_config: Any, windows: Sequence[int | None], together: int = 0) -> CacheShape:
    layers = tuple(Layers(windows.count(window), window) for window in dict.fromkeys(windows))
    return CacheShape(
        layers,
        int(vllm_config.cache_config.block_size),
        int(vllm_config.max_in_flight_tokens),
        int(vllm_config.model_config.max_model_len),
        together,
    )


def _own_windows(config: Any, count: int, everywhere: int | None) -> list[int | None]:
    """How far each layer of the dense model looks back; `everywhere` is what all do that do not differ."""
    types = getattr(config, "layer_types", None) or []
    if len(set(types)) < 2:
        return [everywhere] * count
    return [config.sliding_window if one == "sliding_attention" else None for one in types]


def _windows(config: Any, everywhere: int | None, longest: int) -> list[int | None]:
    """How far each layer with a cache of its own looks back, of a model with or without `block_configs`."""
    blocks = getattr(config, "block_configs", None)
    if not blocks:
        return _own_windows(config, config.num_hidden_layers, everywhere)
    windows: list[int | None] = []
    limited = windows_of(config)
    for block, own in enumerate(_own_windows(config, len(blocks), everywhere)):
        if not blocks[block]["attention"]["no_op"]:
            size = limited.get(block)
            windows.append(own if size is None else size if size < longest else None)
    return windows


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
    # A draft's group is the first: vLLM 0.32 gives its draft the blocks of that one, whichever holds its layers.
    for names in drafting + [names for names in types if names not in drafting]:
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
