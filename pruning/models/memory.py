"""What a window plan takes at its peak, loaded whole or block by block, from the headers of the weight files alone.

    needs = needed(weight_files(directory), family, work)
    needs.whole, needs.streamed    # bytes

The constants were measured on one core of a CPU (docs/use/scale.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pruning.families import Family
from pruning.models.weight_files import WeightFiles

RUNTIME_BYTES = 640 * 2**20  # Python, torch and transformers
HELD_STATES_BYTES = 2**30  # what enters all blocks is kept in memory up to this, else on disk (forward/spill.py)
FFN_WIDTHS = 4  # of a block's forward: gate, its activation, up, their product
STREAM_WIDTHS = 12  # the stream, its norms, queries, keys, values, and attention's output, with what torch copies
GRADIENT = 2  # a block's graph beside its forward


@dataclass(frozen=True, slots=True)
class Work:
    """What is run through the model.

    Attributes:
        itemsize: Bytes of a number that is computed in.
        row: Tokens of a row that plans are chosen on.
        rows: Tokens of all such rows that are judged together.
        measured: Tokens of a row that the result is measured on.
        hidden: D.
        ffn: F.
        layers: L.
    """

    itemsize: int
    row: int
    rows: int
    measured: int
    hidden: int
    ffn: int
    layers: int

    @property
    def of_block(self) -> int:
        """Bytes of what one block makes of one row, at most."""
        each = (FFN_WIDTHS * self.ffn + STREAM_WIDTHS * self.hidden) * self.itemsize
        return max(self.measured * each, self.row * GRADIENT * each)

    def states(self, tokens: int) -> int:
        """Bytes of what enters every block, and of the streams, where so many tokens go together."""
        each = tokens * self.hidden * self.itemsize
        return min(self.layers * each, HELD_STATES_BYTES) + 3 * each


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes at the peak.

    Attributes:
        whole: With the model in memory.
        streamed: With one block, and the next one as it is stored.
    """

    whole: int
    streamed: int


def needed(files: WeightFiles, family: Family, work: Work) -> Needed:
    """What a run takes at its peak.

    Args:
        files: Of the model.
        family: Where its parts are.
        work: What is run.
    """
    numbers = {name: prod(header["shape"]) for name, header in files.headers.items()}
    blocks: dict[str, list[str]] = {}
    outside = []
    for name in numbers:
        head, _, rest = name.partition(family.blocks + ".")
        if rest and not head:
            blocks.setdefault(rest.partition(".")[0], []).append(name)
        else:
            outside.append(name)
    block = max((sum(numbers[name] for name in names) for names in blocks.values()), default=0)
    stored = max((_stored(files.headers, names) for names in blocks.values()), default=0)
    ends = max((numbers[name] for name in outside), default=0)
    tokens = max(work.rows, work.measured)
    held = max(ends * work.itemsize, block * work.itemsize + work.of_block)
    longest = max(work.row, work.measured)
    return Needed(
        RUNTIME_BYTES + sum(numbers.values()) * work.itemsize + work.of_block + work.states(longest),
        RUNTIME_BYTES + held + stored + work.states(tokens),
    )  # fmt: skip


def _stored(headers: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> int:
    spans = (headers[name]["data_offsets"] for name in names)
    return sum(end - start for start, end in spans)
