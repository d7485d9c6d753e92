"""FFNs whose units gates chose: what is refitted and what was trained, of all units and of those that stay."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.models.modeling import blocks_of
from pruning.plan import Sublayer
from pruning.recovery.emulation import Recovery
from pruning.recovery.lora import SCALE
from pruning.recovery.training_state import Carried
from pruning.variants.base import Emulation
from pruning.variants.narrow import Narrow, narrowed


def whole_projections(
    model: PreTrainedModel, family: Family, recovery: Recovery, kept: Mapping[Sublayer, Tensor]
) -> dict[str, Tensor]:
    """Output projections [D, F] of narrower FFNs, with the dense model's columns for the units that went.

    Args:
        model: Dense model.
        family: Where its parts are.
        recovery: With the narrower FFNs.
        kept: The units that each of them keeps, int64 [n].

    Returns:
        Name in the dense model -> weight.
    """
    found = {}
    for sublayer, units in kept.items():
        made = recovery.emulations[sublayer]
        assert isinstance(made, Narrow)
        name = f"{_prefix(family, sublayer)}.{family.ffn_output}.weight"
        found[name] = model.get_parameter(name).detach().clone()
        found[name][:, units] = made.projection.weight.detach()
    return found


def narrower(
    model: PreTrainedModel, family: Family, refitted: Mapping[str, Tensor], kept: Mapping[Sublayer, Tensor],
    carried: Carried,
) -> tuple[dict[Sublayer, Emulation | None], Carried]:  # fmt: skip
    """FFNs of the units that stay, untrained; and what was trained, with their weights in the place of changes.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        refitted: From `whole_projections`.
        kept: The units that each of them keeps, int64 [n].
        carried: With changes of the linear maps of whole FFNs.
    """
    emulations: dict[Sublayer, Emulation | None] = {}
    parameters, output = dict(carried.parameters), family.ffn_output
    assert output is not None
    for sublayer, units in kept.items():
        prefix = _prefix(family, sublayer)
        ffn = copy.deepcopy(blocks_of(model, family)[sublayer.block].get_submodule(family.ffn))
        if (whole := refitted.get(f"{prefix}.{output}.weight")) is not None:
            ffn.get_parameter(f"{output}.weight").data = whole
        emulations[sublayer] = narrowed(ffn, output, model.config, units)
        ffn.float()
        with torch.no_grad():
            for name, weight in ffn.named_parameters():
                change = f"{prefix}.{name.removesuffix('.weight')}"
                if f"{change}.up" in carried.parameters:
                    weight += SCALE * carried.parameters[f"{change}.up"] @ carried.parameters[f"{change}.down"]
        trained = narrowed(ffn, output, model.config, units)
        parameters |= {f"{sublayer}.{name}": parameter.detach() for name, parameter in trained.named_parameters()}
    return emulations, replace(carried, parameters=parameters)


def _prefix(family: Family, sublayer: Sublayer) -> str:
    return f"{family.blocks}.{sublayer.block}.{family.ffn}"
