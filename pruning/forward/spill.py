"""Lists of tensors that go to a temporary file where memory would hold too many of them."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from typing import IO, overload

import torch
from torch import Tensor

from pruning.errors import StorageError
from pruning.workdir import cache_directory

BUDGET_BYTES = 2**30  # of the streams of one fit, above which they are kept in files

_Place = tuple[int, torch.Size, torch.dtype, torch.device]
"""First byte in the file, and what is there."""


class Spilled(Sequence[Tensor]):
    """A list of tensors in a temporary file of the user's cache: `append`, `[i]`, `[i] = t` (no larger) and `copy`.

    Reading gives a tensor of its own, bit-identical to what was written, on the device it came from. The file has no
    name, so nothing stays behind however the process ends. It is read and written, not mapped, so that no more than
    one of the tensors is resident.

    Args:
        needed_bytes: What will be written, to be refused now where the disk is too full.

    Raises:
        StorageError: The cache cannot be written to, or has too little room; also by what writes.
    """

    def __init__(self, needed_bytes: int = 0) -> None:
        self._directory = cache_directory() / "spill"
        self._places: list[_Place] = []
        self._end = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._directory).free
            file: IO[bytes] = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"cannot write to {self._directory}: {error.strerror or error}") from error
        weakref.finalize(self, file.close)
        self._file = file
        if free < needed_bytes:
            raise StorageError(
                f"the fit keeps {needed_bytes / 2**20:.0f} MiB in {self._directory} but only {free / 2**20:.0f} MiB "
                "are free; free some space, set XDG_CACHE_HOME or lower --calibration-tokens"
            )

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        first, shape, dtype, device = self._places[index]
        out = torch.empty(shape, dtype=dtype)
        self._file.seek(first)
        self._file.readinto(_bytes(out))  # type: ignore[attr-defined]
        return out.to(device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        first, shape, dtype, _ = self._places[index]
        assert tensor.nbytes <= shape.numel() * dtype.itemsize
        self._places[index] = self._write(first, tensor)

    def append(self, tensor: Tensor) -> None:
        """Add a tensor at the end."""
        self._places.append(self._write(self._end, tensor))
        self._end += tensor.nbytes

    def pop(self) -> Tensor:
        """Take the last tensor out."""
        last = self[-1]
        self._end = self._places.pop()[0]
        return last

    def copy(self) -> "Spilled":
        """The same tensors in a file of their own."""
        other = Spilled(self._end)
        for tensor in self:
            other.append(tensor)
        return other

    def _write(self, first: int, tensor: Tensor) -> _Place:
        try:
            self._file.seek(first)
            self._file.write(_bytes(tensor))
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write to {self._directory}: {error.strerror or error}") from error
        return first, tensor.shape, tensor.dtype, tensor.device


class SpilledNames(MutableMapping[str, Tensor]):
    """Tensors by name in a temporary file; what is replaced or deleted keeps its room there."""

    def __init__(self) -> None:
        self._tensors: Spilled | None = None
        self._numbers: dict[str, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        number = self._numbers[name]
        assert self._tensors is not None
        return self._tensors[number]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._tensors is None:
            self._tensors = Spilled()
        self._numbers[name] = len(self._tensors)
        self._tensors.append(tensor)

    def __delitem__(self, name: str) -> None:
        del self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


Batches = list[Tensor] | Spilled
"""One tensor for each batch of windows, in memory or not."""


def batches(each_bytes: int, copies: int = 1) -> Batches:
    """An empty list for `each_bytes` of tensors, `copies` of which will live at a time: in memory up to the budget.

    Raises:
        StorageError: They are more, and the cache has no room for them.
    """
    whole = each_bytes * copies
    return [] if whole <= BUDGET_BYTES else Spilled(whole)


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; its own memory where it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
