"""Cut a dense model into the pruned one, in place."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from pruning.families import Family, keep_blocks
from pruning.models.configuration import as_fields
from pruning.models.modeling import (
    block_configs_of,
    blocks_of,
    connect_sources,
    number_cache_layers,
    replace_sublayer,
)
from pruning.plan import Plan, Sublayer
from pruning.variants.base import Emulation


def apply_plan(
    model: PreTrainedModel, family: Family, plan: Plan, emulations: Mapping[Sublayer, Emulation | None]
) -> None:
    """Cut the removed sublayers out of a dense model in place, and drop the blocks that are wholly removed.

    The model's own configuration follows, so that it picks the right mask for every block that stays. Emulations that
    read other blocks are given these blocks' new numbers.
    """
    blocks = blocks_of(model, family)
    for sublayer in plan.removed:
        replace_sublayer(blocks[sublayer.block], family, sublayer.kind, emulations.get(sublayer))
    indices = plan.blocks_kept()
    kept = [blocks[index] for index in indices]
    for emulation in emulations.values():
        if emulation is not None:
            emulation.renumber(indices)
    parent, _, name = family.blocks.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    number_cache_layers(kept, family)
    connect_sources(kept, family)
    keep_blocks(model.config, indices)
    if getattr(model.config, "block_configs", None) is not None:  # a checkpoint that was cut before
        model.config.block_configs = as_fields(block_configs_of(model, family))
