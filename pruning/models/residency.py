"""Where the parts of a model are while it runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Residency:
    """Where the parts of a model are: here, all in memory. `forward.streaming.Streamed` loads them when needed."""

    keeps_blocks = True
    dtype: str | None = None
    """That the weights are stored in, such as `bfloat16`; None: that of the model in memory."""

    def block(self, index: int) -> AbstractContextManager[None]:
        """Hold a block in memory inside the `with`."""
        return nullcontext()

    def embedding(self) -> AbstractContextManager[None]:
        """Hold what comes before block 0."""
        return nullcontext()

    def head(self) -> AbstractContextManager[None]:
        """Hold what comes after the last block."""
        return nullcontext()

    def each(self, indices: Iterable[int]) -> Iterator[int]:
        """The numbers of blocks one after the other, each in memory while it is its turn."""
        for index in indices:
            with self.block(index):
                yield index

    def change(self, weights: "Mapping[str, Tensor]") -> None:
        """Let parameters be these tensors from now on; a model in memory is changed in place instead.

        Args:
            weights: Name -> tensor.
        """
        assert not weights
