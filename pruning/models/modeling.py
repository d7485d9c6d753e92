"""transformers side of a depth-pruned model: stand-ins for sublayers, surgery, and the checkpoint's classes."""

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from pruning.families import FAMILIES, Family, output_projection, places
from pruning.models.configuration import config_class, register_configs
from pruning.plan import KINDS, Kind
from pruning.variants import of_entry
from pruning.variants.base import Emulation
from pruning.variants.taps import Tap


def sources_of(emulation: nn.Module | None) -> tuple[int, ...]:
    """Blocks whose attention an emulation reads."""
    return emulation.sources if isinstance(emulation, Emulation) else ()


@contextmanager
def fed(emulation: nn.Module | None, taps: Mapping[int, Tap]) -> Iterator[None]:
    """Let an emulation read these taps (block -> tap) inside the `with`; a source without one counts as zero."""
    if not isinstance(emulation, Emulation) or not emulation.sources:
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


class AttentionStandIn(nn.Module):
    """Takes the place of a removed attention module; has no KV cache."""

    def __init__(self, emulation: Emulation | None) -> None:
        super().__init__()
        self.emulation = emulation

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The update (zero where nothing emulates it) and no attention weights."""
        if self.emulation is None:
            return hidden_states.new_zeros(()), None
        return self.emulation.update(hidden_states, kwargs), None


class FFNStandIn(nn.Module):
    """Takes the place of a removed FFN module."""

    def __init__(self, emulation: Emulation | None) -> None:
        super().__init__()
        self.emulation = emulation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The update (zero where nothing emulates it)."""
        return hidden_states.new_zeros(()) if self.emulation is None else self.emulation.update(hidden_states, {})


def stand_in(kind: Kind, emulation: Emulation | None) -> nn.Module:
    """The stand-in for a sublayer of this kind."""
    return AttentionStandIn(emulation) if kind == "attention" else FFNStandIn(emulation)


def replace_sublayer(block: nn.Module, family: Family, kind: Kind, emulation: Emulation | None) -> None:
    """Take a sublayer and its norms out of a block, or only its linear maps where others are shared, in place."""
    module, *norms = places(family, kind)
    if emulation is not None and emulation.in_place:
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


def emulation_in(block: nn.Module, family: Family, kind: Kind) -> Emulation | None:
    """What emulates a removed sublayer in this block; None where nothing does, or where it is kept."""
    emulation = getattr(getattr(block, places(family, kind)[0]), "emulation", None)
    return emulation if isinstance(emulation, Emulation) else None


def lent(
    emulation: Emulation | None, blocks: Sequence[nn.Module], family: Family, kind: Kind
) -> AbstractContextManager[None]:
    """Let what emulates a sublayer borrow from other blocks inside the `with`."""
    return nullcontext() if emulation is None else emulation.borrowing(blocks, places(family, kind)[0])


def connect_sources(blocks: Sequence[nn.Module], family: Family) -> None:
    """Let every emulation that has sources read them in each forward from now on; numbers are those of `blocks`."""
    taps: dict[int, Tap] = {}
    for block in blocks:
        for kind, emulation in ((kind, emulation_in(block, family, kind)) for kind in KINDS):
            if emulation is None:
                continue
            emulation.borrow(blocks, places(family, kind)[0])
            for source in emulation.sources:
                if source not in taps:
                    taps[source] = Tap()
                    tap_into(getattr(blocks[source], family.attention), taps[source], cache=family.shares_cache)
            if emulation.sources:
                emulation.taps = [taps[source] for source in emulation.sources]


def apply_block_configs(blocks: nn.ModuleList, family: Family, config: Any) -> None:
    """Give freshly built blocks the shape `config.block_configs` describes, in place."""
    for block, block_config in zip(blocks, config.block_configs, strict=True):
        for kind in KINDS:
            entry = block_config[kind]
            own, found = getattr(block, places(family, kind)[0]), of_entry(entry)
            if found is not None:
                built = found.build(entry, own, config, output_projection(family, kind))
                replace_sublayer(block, family, kind, built)
            elif entry["no_op"]:
                replace_sublayer(block, family, kind, None)
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
        emulation = emulation_in(block, family, kind)
        gone = isinstance(module, AttentionStandIn | FFNStandIn)
        described = {"no_op": gone, "emulation": None} if emulation is None else emulation.entry()
        output = getattr(module, family.ffn_output, None) if kind == "ffn" and family.ffn_output else None
        if isinstance(output, nn.Linear) and output.in_features != usual_size:
            described["intermediate_size"] = output.in_features
        return described

    return [{kind: entry(block, kind) for kind in KINDS} for block in blocks_of(model, family)]


def added_tensors(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """What variants that work inside a sublayer add to a model's parameters, by their names in a checkpoint."""
    return {
        f"{family.blocks}.{index}.{places(family, kind)[0]}.{name}": parameter.data
        for index, block in enumerate(blocks_of(model, family))
        for kind in KINDS
        if (emulation := emulation_in(block, family, kind)) is not None and emulation.in_place
        for name, parameter in emulation.named_parameters()
    }


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
