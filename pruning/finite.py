"""Numbers that are not finite are refused where they come up: in weights read, in losses, in what would be written."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pruning.errors import NumberError

PART_NUMBERS = 2**24  # looked at at a time: the sum of a bfloat16 tensor makes a float32 copy of it
REMEDY = "use --dtype float32 or bfloat16, which hold larger numbers, or check the model"


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite.

    One sum tells: it is not finite if one of its terms is not. A sum that overflows by itself is looked at again.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    parts = tensor.detach().reshape(-1).split(PART_NUMBERS)
    return all(bool(part.sum(dtype=torch.float32).isfinite()) or bool(part.isfinite().all()) for part in parts)


def check_tensors(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Refuse a tensor with a number that is not finite.

    Args:
        tensors: Names and tensors.
        what: Where they are from, for the message.

    Raises:
        NumberError: The first such tensor.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            count = int((~tensor.isfinite()).sum())
            raise NumberError(f"{what}: {name} holds {count} of {tensor.numel()} numbers that are NaN or infinite")


def check_numbers(values: Mapping[str, float], what: str) -> None:
    """Refuse a number that is not finite; see `check_tensors`.

    Raises:
        NumberError: The first such number.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise NumberError(f"{what}: {name} is {value}; {REMEDY}")
