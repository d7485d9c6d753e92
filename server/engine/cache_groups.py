"""How the KV cache of a model with windows is cut into groups of KV heads, and what a request then takes of it.

vLLM 0.32 hands out blocks of one size and gives each group of attentions blocks of its own for every request. It makes
groups of whole layers, as many in each, and takes for that number the smaller type's layers (the larger's within 1.5
times), which suits models that repeat one pattern. Plans do not: 22 full and 10 limited layers waste eight full ones.
Here a group holds up to g heads, those of whole layers or of parts of them, all of one type. For g it takes what costs
least for a request as long as the longest, each further group counted as `GROUP_COST` of it: a group has block tables
and attention metadata of its own in every step (measured: 0.2 ms for 8 requests on a CPU).

Where all attentions have as many heads, this is so many layers a group, in any layout of the cache. Where a layer is
full for some heads and limited for others, a block holds pages of different sizes side by side, for which vLLM has
layouts with the block outermost.

A limited head reserves more than its window: also the tokens of the chunks in flight (two where scheduling is
asynchronous), because blocks are freed a step late, and one block more, because a window may begin inside one.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pruning.variants import positions_of
from server.engine.variants import full_heads_of

logger = logging.getLogger("vllm.shoal")  # vLLM's handlers, in its processes

GROUP_COST = 0.02
DRAFT = "draft_model."  # vLLM's prefix of the layers of a draft


@dataclass(frozen=True, slots=True)
class Attentions:
    """Attentions of one type, each all heads of a layer or some.

    Attributes:
        heads: KV heads of each, on one tensor-parallel rank.
        window: Positions each looks back, its own included; None: all.
    """

    heads: tuple[int, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What decides how many blocks a request takes. All heads are those of one tensor-parallel rank.

    Attributes:
        types: The attentions, by type.
        layer_heads: KV heads of a whole layer.
        block_tokens: Tokens of one block.
        in_flight_tokens: Tokens scheduled but not yet settled, at most.
        max_model_len: Tokens of the longest request.
        together: Heads of attentions beside those that must be in one group, and keep every token (a draft's).
    """

    types: tuple[Attentions, ...]
    layer_heads: int
    block_tokens: int
    in_flight_tokens: int
    max_model_len: int
    together: tuple[int, ...] = ()

    def reserved(self, window: int | None) -> int:
        """Blocks of one group that vLLM reckons the longest request with."""
        if window is None:
            return -(-self.max_model_len // self.block_tokens)
        return -(-min(window - 1 + self.in_flight_tokens, self.max_model_len) // self.block_tokens) + 1

    def blocks(self, tokens: int, window: int | None) -> int:
        """Blocks of one group that a request of so many tokens is admitted with."""
        return min(-(-tokens // self.block_tokens), self.reserved(window))

    def held(self, tokens: int) -> int:
        """Tokens of one head, summed over the heads, that a request of so many tokens holds between its steps.

        What a plan counts: no padding, no part of a block, nothing in flight.
        """
        kept = sum(sum(one.heads) * min(tokens, one.window or tokens) for one in self.types)
        return kept + sum(self.together) * tokens

    @property
    def group_heads(self) -> int:
        """g, the heads of one group."""
        types = tuple((one.heads, self.reserved(one.window)) for one in self.types)
        return cheapest_group(types, (self.together, self.reserved(None) if self.together else 0))

    def groups(self) -> list[int | None]:
        """The window of each group."""
        size = self.group_heads
        found = [one.window for one in self.types for _ in packed(one.heads, size)]
        return found + [None] * bool(self.together)

    def head_blocks(self, tokens: int) -> int:
        """Blocks of one head, padding included, that a request of so many tokens is admitted with."""
        return self.group_heads * sum(self.blocks(tokens, window) for window in self.groups())


def spread(heads: Sequence[int], count: int) -> list[list[int]]:
    """Indices of attentions in `count` groups: the widest first, each into the group that is emptiest so far.

    Where all are as wide, each group has one of every `count`, so that every pipeline stage has some of each.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in sorted(range(len(heads)), key=lambda index: -heads[index]):
        group = filled.index(min(filled))
        groups[group].append(index)
        filled[group] += heads[index]
    return groups


@cache
def _widths(heads: tuple[int, ...]) -> list[int]:
    """Heads of the widest group where there are 1, 2, ... groups."""
    counts = range(1, len(heads) + 1)
    return [max(sum(heads[index] for index in group) for group in spread(heads, count)) for count in counts]


def packed(heads: tuple[int, ...], size: int) -> list[list[int]]:
    """Indices of attentions in as few groups as hold no more than `size` heads each."""
    widths = _widths(heads)
    return spread(heads, next(count for count, width in enumerate(widths, 1) if width <= size)) if heads else []


@cache
def cheapest_group(
    types: tuple[tuple[tuple[int, ...], int], ...], together: tuple[tuple[int, ...], int] = ((), 0)
) -> int:
    """g, the heads of a group, that costs least; the larger one of equals.

    Args:
        types: (KV heads of each attention, blocks that a request takes of each group) of each type.
        together: The same of attentions that must be in one group.
    """

    def cost(size: int) -> float:
        groups = [(len(packed(heads, size)), blocks) for heads, blocks in types]
        groups += [(1, together[1])] if together[0] else []
        taken = size * sum(count * blocks for count, blocks in groups)
        return taken * (1 + GROUP_COST * sum(count for count, _ in groups))

    least = max(sum(together[0]), *(max(heads) for heads, _ in types), 1)
    sizes = {sum(together[0]), *(width for heads, _ in types for width in _widths(heads))}
    return min((size for size in sizes if size >= least), key=lambda size: (cost(size), -size))


def shape_of(vllm_config: Any) -> CacheShape:
    """The shape of a running engine's cache, of all pipeline stages together."""
    model, cache_config = vllm_config.model_config, vllm_config.cache_config
    heads = _layer_heads(vllm_config)
    found = _attentions(model.hf_text_config, cache_config.sliding_window, model.max_model_len, heads)
    drafting: list[int] = []
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.method == "draft_model":
        draft = vllm_config.speculative_config.draft_model_config.hf_text_config
        drafting = [count for count, _ in _attentions(draft, None, model.max_model_len, heads)]
    windows = {window for _, window in found}
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and None in windows:
        windows = {None}
    if windows == {None}:  # one type only: one group
        found, drafting = [(count, None) for count in [*(count for count, _ in found), *drafting]], []
    return _shape(vllm_config, found, drafting)


def dense_shape_of(vllm_config: Any) -> CacheShape:
    """The same of the dense model, without a draft."""
    model = vllm_config.model_config
    layers = getattr(model.hf_text_config, "block_configs", None) or [None] * model.hf_text_config.num_hidden_layers
    windows = _own_windows(model.hf_text_config, len(layers), vllm_config.cache_config.sliding_window)
    return _shape(vllm_config, [(_layer_heads(vllm_config), window) for window in windows])


def windows_of(config: Any) -> dict[int, int]:
    """Block -> W, of the layers that a model's configuration limits, all heads or some."""
    entries = [block["attention"] for block in getattr(config, "block_configs", None) or ()]
    found = {block: positions_of(entry) for block, entry in enumerate(entries)}
    return {block: size for block, size in found.items() if size is not None}


def full_heads_in(config: Any) -> dict[int, tuple[int, ...]]:
    """Block -> the KV heads that keep every token, of the layers that a model's configuration limits in part."""
    entries = [block["attention"] for block in getattr(config, "block_configs", None) or ()]
    found = {block: full_heads_of(entry) for block, entry in enumerate(entries)}
    return {block: heads for block, heads in found.items() if heads}


def _layer_heads(vllm_config: Any) -> int:
    return int(vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config))


def _shape(vllm_config: Any, found: Sequence[tuple[int, int | None]], together: Sequence[int] = ()) -> CacheShape:
    windows = dict.fromkeys(window for _, window in found)
    types = (Attentions(tuple(count for count, each in found if each == window), window) for window in windows)
    return CacheShape(
        tuple(types),
        _layer_heads(vllm_config),
        int(vllm_config.cache_config.block_size),
        int(vllm_config.max_in_flight_tokens),
        int(vllm_config.model_config.max_model_len),
        tuple(together),
    )


def _own_windows(config: Any, count: int, everywhere: int | None) -> list[int | None]:
    """How far each layer of the dense model looks back; `everywhere` is what all do that do not differ."""
    types = getattr(config, "layer_types", None) or []
    if len(set(types)) < 2:
        return [everywhere] * count
    return [config.sliding_window if one == "sliding_attention" else None for one in types]


def _attentions(config: Any, everywhere: int | None, longest: int, heads: int) -> list[tuple[int, int | None]]:
    """(KV heads, how far they look back) of each attention with a cache of its own, on one tensor-parallel rank.

    Args:
        config: Of a model with or without `block_configs`.
        everywhere: How far all layers look back that do not differ.
        longest: Tokens of the longest request.
        heads: KV heads of a whole layer on one rank; all ranks have as many full ones of a layer.
    """
    blocks = getattr(config, "block_configs", None)
    if not blocks:
        return [(heads, window) for window in _own_windows(config, config.num_hidden_layers, everywhere)]
    found: list[tuple[int, int | None]] = []
    limited = windows_of(config)
    for block, own in enumerate(_own_windows(config, len(blocks), everywhere)):
        if not blocks[block]["attention"]["no_op"]:
            size = limited.get(block)
            full = 0 if size is None else sum(head < heads for head in full_heads_of(blocks[block]["attention"]))
            if full:
                found.append((full, own))
            window = own if size is None else size if size < longest else None
            found.append((heads - full, window))
    return found


def install() -> None:
    """Let vLLM in this process group the layers of checkpoints with `block_configs` as above (idempotent).

    `get_kv_cache_groups` is what every caller asks, and knows the model; the choice of g is in the middle of functions
    that it calls, which stand in for ours while such a model is asked about.
    """
    from vllm.v1.attention.backends import utils
    from vllm.v1.core import kv_cache_utils

    usual: Any = kv_cache_utils.get_kv_cache_groups
    if getattr(usual, "shoal", False):
        return

    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[Any]:
        if not _is_ours(vllm_config):
            groups: list[Any] = usual(vllm_config, kv_cache_spec)
            return groups
        _join_draft(kv_cache_spec)
        alike: Any = kv_cache_utils._get_kv_cache_groups_uniform_page_size
        mixed: Any = kv_cache_utils._get_packed_kv_cache_groups
        kv_cache_utils._get_kv_cache_groups_uniform_page_size = lambda specs: _groups(vllm_config, specs)
        kv_cache_utils._get_packed_kv_cache_groups = lambda config, specs: (
            _groups(config, specs) if _sizes_differ(specs.values()) else None
        )
        try:
            groups = usual(vllm_config, kv_cache_spec)
        finally:
            kv_cache_utils._get_kv_cache_groups_uniform_page_size = alike
            kv_cache_utils._get_packed_kv_cache_groups = mixed
        return groups

    get_kv_cache_groups.shoal = True  # type: ignore[attr-defined]
    kv_cache_utils.get_kv_cache_groups = get_kv_cache_groups
    project: Any = kv_cache_utils._project_kv_cache_groups_to_worker
    kv_cache_utils._project_kv_cache_groups_to_worker = lambda *given: _without_strangers(project(*given))
    resolve = _resolving(utils.resolve_kv_cache_layout)
    importer: Any = sys.modules.get("vllm.v1.engine.core")  # by name
    for module in (utils, importer):
        if module is not None:
            module.resolve_kv_cache_layout = resolve


def _resolving(usual: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's choice of a layout, from those that hold pages of several sizes where a model of ours has them."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    def resolve(vllm_config: Any, supported: Sequence[list[str]], specs: Iterable[Any] | None = None) -> Any:
        specs = list(specs or ())
        if not (_is_ours(vllm_config) and _sizes_differ(specs)):
            return usual(vllm_config, supported, specs)
        names = set(supported[0])
        if names == {"LBHNC"} and _on_cpu():  # its kernel takes the distance of two blocks from the tensor
            names.add("BLHNC")
        fitting = [name for name in ("BLHNC", "BLNHC") if name in names and KVCacheLayout[name].is_block_outermost]
        if not fitting:
            raise ValueError(
                f"windows by KV head need an attention backend with the KV cache layout BLHNC or BLNHC; this one has "
                f"{', '.join(sorted(names))}"
            )
        return usual(vllm_config, [fitting] * len(supported), specs)

    return resolve


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _sizes_differ(specs: Iterable[Any]) -> bool:
    return len({spec.page_size_bytes for spec in specs}) > 1


def _without_strangers(groups: list[Any]) -> list[Any]:
    """Groups of one pipeline stage, of which vLLM 0.32 leaves all specs in a group that has no layer there."""
    for group in groups:
        if not group.layer_names:
            group.kv_cache_spec = getattr(group.kv_cache_spec, "first_spec", group.kv_cache_spec)
    return groups


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
    """Groups of attentions; takes the place of vLLM's functions that make them."""
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

    types: list[dict[str, Any]] = []
    for name, spec in specs.items():
        for found in types:
            alike = name.startswith(DRAFT) == next(iter(found)).startswith(DRAFT)
            if alike and UniformTypeKVCacheSpecs.is_uniform_type(found | {name: spec}):
                found[name] = spec
                break
        else:
            types.append({name: spec})

    def sized(found: dict[str, Any]) -> tuple[tuple[int, ...], int]:
        spec = next(iter(found.values()))
        heads = tuple(each.num_kv_heads for each in found.values())
        return heads, -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)

    drafting = [found for found in types if next(iter(found)).startswith(DRAFT)]
    others = [found for found in types if found not in drafting]
    size = cheapest_group(tuple(map(sized, others)), sized(drafting[0]) if drafting else ((), 0))
    # A draft's group is the first: vLLM 0.32 gives its draft the blocks of that one, whichever holds its layers.
    groups = list(map(list, drafting))
    for found in others:
        names = list(found)
        groups += [[names[index] for index in group] for group in packed(sized(found)[0], size)]
    logger.info("KV cache: groups of %d KV heads: %s", size, ", ".join(str(len(group)) for group in groups))
    return [KVCacheGroupSpec(names, _joined({name: specs[name] for name in names})) for names in groups]


def _joined(specs: dict[str, Any]) -> Any:
    """One spec of a group: of all its layers, where they differ in heads."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    each = list(specs.values())
    return UniformTypeKVCacheSpecs.from_specs(specs) if _sizes_differ(each) else type(each[0]).merge(each)
