"""Write a pruned model as a checkpoint directory."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pruning.errors import StorageError
from pruning.families import Family
from pruning.models.configuration import config_class
from pruning.models.modeling import (
    block_configs_of,
)

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
