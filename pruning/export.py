"""Write a pruned model as a checkpoint directory."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pruning.compensation import apply_weights
from pruning.configuration import config_class
from pruning.emulation import Recovery
from pruning.errors import StorageError
from pruning.families import Family, keep_blocks
from pruning.fuse import Fusion, apply_fusion
from pruning.modeling import (
    ContextEmulation,
    KVShareEmulation,
    block_configs_of,
    blocks_of,
    connect_sources,
    number_cache_layers,
    replace_sublayer,
)
from pruning.plan import Plan, Sublayer
from pruning.shared_blocks import SharedEmulation

MAX_SHARD_SIZE = "4GB"
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "generation_config.json",
    "*.jinja",
    "*.model",
)


def apply_plan(
    model: PreTrainedModel, family: Family, plan: Plan, emulations: Mapping[Sublayer, nn.Module | None]
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
        if isinstance(emulation, ContextEmulation | KVShareEmulation):
            emulation.sources = tuple(indices.index(source) for source in emulation.sources)
        elif isinstance(emulation, SharedEmulation):
            emulation.source = indices.index(emulation.source)
    parent, _, name = family.blocks.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    number_cache_layers(kept, family)
    connect_sources(kept, family)
    keep_blocks(model.config, indices)


def apply_recovery(model: PreTrainedModel, family: Family, plan: Plan, recovery: Recovery | Fusion) -> None:
    """Make a dense model the pruned one, in place: changed weights, fused units, and what `apply_plan` cuts."""
    apply_weights(model, recovery.weights)
    if isinstance(recovery, Fusion):
        apply_fusion(model, family, recovery)
        apply_plan(model, family, recovery.plan(plan), {})
    else:
        apply_plan(model, family, plan, recovery.emulations)


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration's fields without `block_configs` and what names its class, files or quantisation."""
    fields: dict[str, Any] = config.to_dict()
    for name in (
        "model_type",
        "architectures",
        "_name_or_path",
        "transformers_version",
        "quantization_config",
        "auto_map",
        "block_configs",
    ):
        fields.pop(name, None)
    return fields


def pruned_config(model: PreTrainedModel, family: Family) -> Any:
    """The configuration of the checkpoint: the fields of a model that `apply_plan` has cut, and `block_configs`."""
    config = config_class(family)(**fields_of(model.config), block_configs=block_configs_of(model, family))
    config.architectures = [family.architecture]
    config.dtype = model.dtype
    return config


def state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors to store by their published names, one an expert; a tied output projection is stored once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return revert_weight_conversion(model, tensors)


def write_weights(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str = MAX_SHARD_SIZE) -> int:
    """Write sharded safetensors with their index; return the tensors' bytes.

    Args:
        tensors: Name -> tensor.
        directory: To write into.
        max_shard_size: Bytes, or a text such as `4GB`.

    Raises:
        StorageError: A shard cannot be written, for example because the disk is full.
    """
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        try:
            save_file(shard, directory / filename, metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(f"cannot write {filename} ({error}); free some space; nothing was kept") from error
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer and generation files untouched."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, directory / path.name)
