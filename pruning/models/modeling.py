"""transformers side of a depth-pruned model: stand-ins for sublayers, surgery, and the checkpoint's classes."""

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pruning.errors import CheckpointError
from pruning.families import FAMILIES, Family
from pruning.models.configuration import config_class, register_configs
from pruning.plan import KINDS, Kind
from pruning.variants.kv_share import KVShareEmulation, Tap, rms_normalise
from pruning.variants.shared import SHARED, SharedEmulation

__all__ = ["KVShareEmulation", "Tap", "rms_normalise"]  # also named here


class BiasEmulation(nn.Module):
    """A constant update [D]: the mean of what the sublayer added (arXiv 2407.16286, emulated update)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Update that broadcasts over [..., D]."""
        return self.bias


class LowRankEmulation(nn.Module):
    """An affine map of rank r of the normalised residual stream: up(down(rms(x))) + bias."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Update [..., D] for the residual stream [..., D]."""
        return self.up(self.down(rms_normalise(hidden)))


class ContextEmulation(nn.Module):
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
        self.taps: list[Tap] = []
        self.down = nn.Linear(hidden_size * (1 + len(self.sources)), rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Update [..., D] for the residual stream [..., D]; the taps hold the sources' outputs."""
        return self.up(self.down(self.features(hidden)))

    def features(self, hidden: Tensor) -> Tensor:
        """What the map reads, [..., D (1+k)]; a source that put nothing out counts as zero."""
        return context_features(hidden, [tap.output for tap in self.taps])


def context_features(hidden: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
    """[rms(x), c_1, ..., c_k] as one [..., D (1+k)] for a residual stream x [..., D]."""
    contexts = [torch.zeros_like(hidden) if c is None else c.expand_as(hidden).to(hidden) for c in outputs]
    return torch.cat([rms_normalise(hidden), *contexts], -1)


def sources_of(emulation: nn.Module | None) -> tuple[int, ...]:
    """Blocks whose attention an emulation reads."""
    return emulation.sources if isinstance(emulation, ContextEmulation | KVShareEmulation) else ()


@contextmanager
def fed(emulation: nn.Module | None, taps: Mapping[int, Tap]) -> Iterator[None]:
    """Let an emulation read these taps (block -> tap) inside the `with`; a source without one counts as zero."""
    if not isinstance(emulation, ContextEmulation | KVShareEmulation):
        yield
        return
    saved = emulation.taps
    emulation.taps = [taps.get(source, Tap()) for source in emulation.sources]
    try:
        yield
    finally:
        emulation.taps = saved


def tap_into(attention: nn.Module, tap: Tap, *, cache: bool) -> ExitStack:
    """Let a tap note what attention puts out and, with `cache`, what it attends to, until the stack closes."""
    stack = ExitStack()
    stack.callback(attention.register_forward_hook(tap).remove)
    if cache and not isinstance(attention, AttentionStandIn):
        stack.callback(attention.register_forward_pre_hook(tap.record, with_kwargs=True).remove)
    return stack


def build_emulation(spec: Mapping[str, Any] | None, hidden_size: int) -> nn.Module | None:
    """Build the module a checkpoint's `emulation` entry names; None where there is none.

    Raises:
        CheckpointError: The kind is not known.
    """
    if spec is None:
        return None
    if spec["kind"] == "bias":
        return BiasEmulation(hidden_size)
    if spec["kind"] == "low_rank":
        return LowRankEmulation(hidden_size, int(spec["rank"]))
    if spec["kind"] == "context":
        return ContextEmulation(hidden_size, int(spec["rank"]), spec["sources"])
    if spec["kind"] == "kv_share":
        ranks = int(spec["rank"]), int(spec["own_rank"])
        return KVShareEmulation(hidden_size, int(spec["heads"]), int(spec["head_dim"]), spec["sources"], *ranks)
    raise CheckpointError(f"emulation kind {spec['kind']!r} is not known to this version of Shoal; upgrade it")


def describe_emulation(emulation: nn.Module | None) -> dict[str, Any] | None:
    """The checkpoint's `emulation` entry for a module: what `build_emulation` builds it from."""
    if emulation is None:
        return None
    if isinstance(emulation, BiasEmulation):
        return {"kind": "bias"}
    if isinstance(emulation, ContextEmulation):
        return {"kind": "context", "rank": emulation.down.out_features, "sources": list(emulation.sources)}
    if isinstance(emulation, KVShareEmulation | SharedEmulation):
        return emulation.describe()
    assert isinstance(emulation, LowRankEmulation)
    return {"kind": "low_rank", "rank": emulation.down.out_features}


class AttentionStandIn(nn.Module):
    """Takes the place of a removed attention module; has no KV cache."""

    def __init__(self, emulation: nn.Module | None) -> None:
        super().__init__()
        self.emulation = emulation

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The update (zero where nothing emulates it) and no attention weights."""
        if self.emulation is None:
            return hidden_states.new_zeros(()), None
        if isinstance(self.emulation, KVShareEmulation):
            return self.emulation(hidden_states, **kwargs), None
        return self.emulation(hidden_states), None


class FFNStandIn(nn.Module):
    """Takes the place of a removed FFN module."""

    def __init__(self, emulation: nn.Module | None) -> None:
        super().__init__()
        self.emulation = emulation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The update (zero where nothing emulates it)."""
        return hidden_states.new_zeros(()) if self.emulation is None else self.emulation(hidden_states)


def stand_in(kind: Kind, emulation: nn.Module | None) -> nn.Module:
    """The stand-in for a sublayer of this kind."""
    return AttentionStandIn(emulation) if kind == "attention" else FFNStandIn(emulation)


def places(family: Family, kind: Kind) -> tuple[str, ...]:
    """Attribute names of a sublayer's module and of the norms that are its own."""
    module = family.attention if kind == "attention" else family.ffn
    return (module, *(norm for norm in family.norms(kind) if norm))


def output_projection(family: Family, kind: Kind) -> str | None:
    """Attribute of a sublayer that holds its output projection; None where experts share the work."""
    return family.attention_output if kind == "attention" else family.ffn_output


def replace_sublayer(block: nn.Module, family: Family, kind: Kind, emulation: nn.Module | None) -> None:
    """Take a sublayer and its norms out of a block, or only its linear maps where others are shared, in place."""
    module, *norms = places(family, kind)
    if isinstance(emulation, SharedEmulation):
        setattr(block, module, emulation.inside(getattr(block, module)))
        return
    setattr(block, module, stand_in(kind, emulation))
    for norm in norms:
        setattr(block, norm, nn.Identity())


def resize_ffn(block: nn.Module, family: Family, config: Any, size: int) -> None:
    """Give a freshly built block an FFN of `size` units, in place."""
    own = copy.copy(config)
    own.intermediate_size = size
    setattr(block, family.ffn, type(getattr(block, family.ffn))(own))


def blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """The model's block list."""
    return cast(nn.ModuleList, model.get_submodule(family.blocks))


def number_cache_layers(blocks: Sequence[nn.Module], family: Family) -> None:
    """Renumber the kept attention layers 0, 1, ... so that a KV cache holds only those."""
    index = 0
    for block in blocks:
        attention = getattr(block, family.attention)
        if not isinstance(attention, AttentionStandIn):
            attention.layer_idx = index
            index += 1


def emulation_in(block: nn.Module, family: Family, kind: Kind) -> nn.Module | None:
    """What emulates a removed sublayer in this block; None where nothing does, or where it is kept."""
    emulation = getattr(getattr(block, places(family, kind)[0]), "emulation", None)
    return emulation if isinstance(emulation, nn.Module) else None


@contextmanager
def lent(emulation: nn.Module | None, blocks: Sequence[nn.Module], family: Family, kind: Kind) -> Iterator[None]:
    """Let a shared sublayer's differences borrow from their source among these blocks inside the `with`."""
    if not isinstance(emulation, SharedEmulation):
        yield
        return
    maps = list(emulation.maps().values())
    saved = [shared.lender for shared in maps]
    emulation.lend(getattr(blocks[emulation.source], places(family, kind)[0]))
    try:
        yield
    finally:
        for shared, lender in zip(maps, saved, strict=True):
            shared.lender = lender


def connect_sources(blocks: Sequence[nn.Module], family: Family) -> None:
    """Let every emulation that has sources read them in each forward from now on; numbers are those of `blocks`."""
    taps: dict[int, Tap] = {}
    for block in blocks:
        for kind, emulation in ((kind, emulation_in(block, family, kind)) for kind in KINDS):
            if isinstance(emulation, SharedEmulation):
                emulation.lend(getattr(blocks[emulation.source], places(family, kind)[0]))
            for source in sources_of(emulation):
                if source not in taps:
                    taps[source] = Tap()
                    tap_into(getattr(blocks[source], family.attention), taps[source], cache=family.shares_cache)
            if isinstance(emulation, ContextEmulation | KVShareEmulation):
                emulation.taps = [taps[source] for source in emulation.sources]


def apply_block_configs(blocks: nn.ModuleList, family: Family, config: Any) -> None:
    """Give freshly built blocks the shape `config.block_configs` describes, in place."""
    for block, block_config in zip(blocks, config.block_configs, strict=True):
        for kind in KINDS:
            spec = block_config[kind]["emulation"]
            if spec is not None and spec["kind"] == SHARED:
                own, output = getattr(block, places(family, kind)[0]), output_projection(family, kind)
                shared = SharedEmulation.of(own, int(spec["source"]), int(spec["rank"]), output)
                replace_sublayer(block, family, kind, shared)
            elif block_config[kind]["no_op"]:
                replace_sublayer(block, family, kind, build_emulation(spec, config.hidden_size))
        size = block_config["ffn"].get("intermediate_size", config.intermediate_size)
        if size != config.intermediate_size:
            resize_ffn(block, family, config, size)
    number_cache_layers(list(blocks), family)
    connect_sources(list(blocks), family)


def block_configs_of(model: nn.Module, family: Family) -> list[dict[str, dict[str, Any]]]:
    """The shape of a model that `apply_plan` has cut, in the checkpoint's form: one entry a block."""
    usual_size = model.config.intermediate_size

    def entry(block: nn.Module, kind: Kind) -> dict[str, Any]:
        module = getattr(block, family.attention if kind == "attention" else family.ffn)
        gone = isinstance(module, AttentionStandIn | FFNStandIn)
        described = {"no_op": gone, "emulation": describe_emulation(emulation_in(block, family, kind))}
        output = getattr(module, family.ffn_output, None) if kind == "ffn" and family.ffn_output else None
        if isinstance(output, nn.Linear) and output.in_features != usual_size:
            described["intermediate_size"] = output.in_features
        return described

    return [{kind: entry(block, kind) for kind in KINDS} for block in blocks_of(model, family)]


def base_model_class(family: Family, head: str = "ForCausalLM") -> type[PreTrainedModel]:
    """The dense family's `<Name>ForCausalLM`, or its `<Name>Model` without the output projection."""
    stem = family.decoder if head == "Model" and family.decoder else f"{family.name}{head}"
    return getattr(importlib.import_module(family.transformers_module), stem)


def _define(family: Family, head: str) -> type[PreTrainedModel]:
    base = base_model_class(family, head)
    path = family.blocks if head == "ForCausalLM" else family.blocks.rpartition(".")[2]

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        apply_block_configs(self.get_submodule(path), family, config)

    init.__annotations__.clear()  # vLLM's transformers backend checks arguments against them, and not Any
    namespace = {
        "__init__": init,
        "__module__": __name__,
        "__doc__": f"{family.name} without the sublayers that `config.block_configs` marks as removed.",
        "config_class": config_class(family),
        "__annotations__": {"config": config_class(family)},
    }
    return type(f"DepthPruned{family.name}{head}", (base,), namespace)


_classes: dict[str, type[PreTrainedModel]] = {}


def model_class(family: Family, head: str = "ForCausalLM") -> type[PreTrainedModel]:
    """The `PreTrainedModel` class of a depth-pruned family, with its output projection or without (`Model`)."""
    name = f"DepthPruned{family.name}{head}"
    if name not in _classes:
        _classes[name] = globals()[name] = _define(family, head)
    return _classes[name]


def register_models() -> None:
    """Register configurations and models with transformers' auto classes (idempotent)."""
    register_configs()
    for family in FAMILIES.values():
        AutoModelForCausalLM.register(config_class(family), model_class(family), exist_ok=True)
        AutoModel.register(config_class(family), model_class(family, "Model"), exist_ok=True)
        if (mapping := get_checkpoint_conversion_mapping(family.model_type)) is not None:
            register_checkpoint_conversion_mapping(family.pruned_model_type, mapping, overwrite=True)
