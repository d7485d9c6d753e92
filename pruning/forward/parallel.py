"""Data parallelism over calibration batches under `torchrun`: every process takes its share, all see all values."""

import os

import torch
from torch import Tensor, distributed


def start() -> None:
    """Join the process group when `torchrun` started this process (gloo on CPU, NCCL on CUDA); idempotent."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def process() -> tuple[int, int]:
    """Number of this process and of all of them."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def everywhere(known: bool) -> bool:
    """Whether something holds in every process; all must ask."""
    return int(gather(torch.tensor([float(known)], dtype=torch.float64))) == process()[1]


def gather(table: Tensor) -> Tensor:
    """Add the processes' tables.

    Every entry is computed by one process and zero in the others, so the sum is exact and does not depend on how many
    there are.

    Args:
        table: float64, any shape, the same in every process.
    """
    if process()[1] > 1:
        device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
        moved = table.to(device)
        distributed.all_reduce(moved)
        return moved.to(table.device)
    return table
