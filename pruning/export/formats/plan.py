"""The `plan` format: one small file for a dense model whose weights stay as they are."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning.export.formats import PrunedModel
from pruning.models.plan_file import CHAIN_VERSION, PLAN, SHAPES, VERSION, PlanFile, Raw

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refusal(pruned: PrunedModel) -> str | None:
    """It holds what is added to a dense model, and nothing else."""
    if pruned.untouched is None:
        return "it holds no weights, and weights of the dense model go or change; use --format shoal"
    return None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write the file; returns the bytes of the weights that are served with it."""
    assert pruned.untouched is not None
    added = pruned.added()
    document = PlanFile(
        version=CHAIN_VERSION if pruned.untouched.manifest.chain else VERSION,
        model_type=pruned.family.model_type,
        shapes={name: int(pruned.fields[name]) for name in SHAPES if pruned.fields.get(name) is not None}
        | {"head_dim": _head_dim(pruned.fields)},
        block_configs=pruned.block_configs,
        manifest=pruned.untouched.manifest.model_copy(update={"files": {}, "digest": ""}),
    )
    (directory / PLAN).write_bytes(document.render({name: raw_of(tensor) for name, tensor in added.items()}))
    return pruned.untouched.base.bytes + sum(tensor.nbytes for tensor in added.values())


def raw_of(tensor: Tensor) -> Raw:
    """A tensor as files hold it."""
    data = tensor.detach().cpu().contiguous()
    return Raw(DTYPES[data.dtype], tuple(data.shape), data.view(torch.uint8).numpy().tobytes())


def _head_dim(fields: Any) -> int:
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])
