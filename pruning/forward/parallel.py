"""Data parallelism over calibration batches under `torchrun`: every process takes its share, all see all values."""

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

LONGEST_REST = timedelta(days=7)  # of what the first process does alone

_alone = False


def start() -> None:
    """Join the process group when `torchrun` started this process (gloo on CPU, NCCL on CUDA); idempotent."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def process() -> tuple[int, int]:
    """Number of this process and of all of them; of one alone after `first_goes_on`."""
    if not _alone and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def first_goes_on() -> bool:
    """Whether this process, the first, goes on alone. All must ask, and nothing is shared later.

    What the first computes after this is whole: it waits for no other, and leaves no batch to them. Processes beside it
    end and free their memory. Those on other machines wait until it has ended, so that all machines end together: one
    that ended before could not take part if the first fails and all are started again.
    """
    global _alone
    rank, processes = process()
    if processes > 1:
        last = distributed.new_group(backend="gloo", timeout=LONGEST_REST)
        if rank > 0 and int(os.environ.get("GROUP_RANK", "0")) > 0:
            with suppress(RuntimeError):  # its connections close when it ends, however it ends
                distributed.barrier(group=last)
        _alone = True
        atexit.register(distributed.destroy_process_group)
    return rank == 0


def of_first(found: Callable[[], Any]) -> Any:
    """What the first process finds, in every process; all must ask.

    For what may differ between machines although all start from the same: a solver with a time limit, text that a model
    writes. It goes through pickle, so no more than lists, numbers and CPU tensors.
    """
    rank, processes = process()
    if processes == 1:
        return found()
    sent = [found() if rank == 0 else None]
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    distributed.broadcast_object_list(sent, src=0, device=device)
    return sent[0]


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
