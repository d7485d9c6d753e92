"""The `llama` format: an ordinary checkpoint of the model's own family, which needs nothing of ours.

Whole blocks may be gone. FFNs of different sizes (as fusing makes them) are padded with zero units to the largest.
"""

from pathlib import Path

import torch
from torch import Tensor

from pruning.export.formats import PrunedModel
from pruning.export.writing import write_weights
from pruning.models.configuration import base_config_class


def refusal(pruned: PrunedModel) -> str | None:
    """A family's own checkpoint has attention and an FFN in every block."""
    for index, block in enumerate(pruned.block_configs):
        for kind in ("attention", "ffn"):
            if block[kind]["no_op"]:
                return (
                    f"{kind}.{index} is gone but its block is not, and a {pruned.family.name} has both in every block; "
                    "remove --blocks, or choose the format shoal or nemotron-nas"
                )
    return None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write configuration and weights; returns the bytes of the weights."""
    size = max(pruned.ffn_size(index) for index in range(len(pruned.block_configs)))
    config = base_config_class(pruned.family)(**{**pruned.fields, "intermediate_size": size})
    config.architectures = [f"{pruned.family.name}ForCausalLM"]
    config.save_pretrained(directory)
    ffn = f".{pruned.family.ffn}."
    return write_weights({n: _padded(t, n, size) if ffn in n else t for n, t in pruned.tensors.items()}, directory)


def _padded(tensor: Tensor, name: str, size: int) -> Tensor:
    """One of an FFN's tensors with zero units up to `size`."""
    projection, _, what = name.rpartition(".")
    if projection.endswith("gate_up_proj"):
        return torch.cat([_rows(half, size) for half in tensor.chunk(2)])
    if projection.endswith(("gate_proj", "up_proj")):
        return _rows(tensor, size)
    if projection.endswith("down_proj") and what == "weight":
        return _rows(tensor.T, size).T
    return tensor


def _rows(tensor: Tensor, size: int) -> Tensor:
    missing = size - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
