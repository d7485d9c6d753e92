"""Where the parts of a model are while it runs."""

from contextlib import AbstractContextManager, nullcontext


class Residency:
    """Where the parts of a model are: here, all in memory. `forward.streaming.Streamed` loads them when needed."""

    keeps_blocks = True

    def block(self, index: int) -> AbstractContextManager[None]:
        """Hold a block in memory inside the `with`."""
        return nullcontext()

    def embedding(self) -> AbstractContextManager[None]:
        """Hold what comes before block 0."""
        return nullcontext()

    def head(self) -> AbstractContextManager[None]:
        """Hold what comes after the last block."""
        return nullcontext()
