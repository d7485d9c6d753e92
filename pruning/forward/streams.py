"""Residual streams that plans share, and what plans and batches are called in a journal."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning.forward.blocks import Gone, Taps
from pruning.models.modeling import sources_of
from pruning.variants.base import Emulation


@dataclass(slots=True)
class State:
    """A residual stream [b, T, D], the plans that still share it, and what its attention layers handed on."""

    hidden: Tensor
    plans: list[int]
    taps: Taps = field(default_factory=dict)


def only(taps: Taps, blocks: Collection[int]) -> Taps:
    """The taps of some blocks."""
    return {block: tap for block, tap in taps.items() if block in blocks}


def describe(plan: Gone) -> list[str]:
    """What a plan is made of, for a journal's key: sublayers and the digests of their emulations."""
    return [str(s) if plan[s] is None else f"{s}:{_fingerprint(plan[s])}" for s in sorted(plan)]


def _fingerprint(module: nn.Module | None) -> str:
    assert module is not None
    described = module.entry() if isinstance(module, Emulation) else None
    digest = hashlib.sha256(f"{sources_of(module)} {described}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tile(value: Any, rows: int, times: int) -> Any:
    """Repeat the batch dimension of a block's arguments; those with one row broadcast by themselves."""
    if isinstance(value, Tensor):
        return (
            value.repeat(times, *[1] * (value.dim() - 1)) if value.dim() > 1 and value.shape[0] == rows > 1 else value
        )
    if isinstance(value, tuple | list):
        return type(value)(tile(item, rows, times) for item in value)
    if isinstance(value, Mapping):
        return {key: tile(item, rows, times) for key, item in value.items()}
    return value
