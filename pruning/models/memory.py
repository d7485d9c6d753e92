"""What a plan takes at its peak, loaded whole or block by block, from the headers of the weight files alone.

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

RUNTIME_BYTES = 700 * 2**20  # Python, torch and transformers
HELD_STATES_BYTES = 2**30  # what enters all blocks is kept in memory up to this, else on disk (forward/spill.py)
FFN_WIDTHS = 4  # of a block's forward: gate, its activation, up, their product
STREAM_WIDTHS = 12  # the stream, its norms, queries, keys, values, and attention's output, with what torch copies
GRADIENT = 2  # a block's graph beside its forward
MATRICES = 6  # of attention, all heads, that a graph with gates holds: logits, probabilities and gradients, twice
SQUARES, CROSSES, TARGETS = 8, 7, 5  # float64 matrices [F, F], [F, M] and [M, M] while a fit is solved (regression.py)
FIT_STATES = 3  # streams of a fit: dense, pruned, and a copy of one; on disk where they are more than `spill` allows
STREAMED_STATE_BYTES = 2**28  # streams that are scored together: what does not fit in reads the blocks once more
MEASURED_PLANS = 3  # that are measured together: dense, removed, and with adapters
LOGITS = 4  # of one chunk, in float32, where the final norm is scaled (recovery/recalibration.py)
CHUNK_TOKENS = 512


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
        heads: H.
    """

    itemsize: int
    row: int
    rows: int
    measured: int
    hidden: int
    ffn: int
    layers: int
    heads: int

    @property
    def at_once(self) -> int:
        """Tokens that go through the model together where it is in memory as a whole."""
        return max(self.row, self.measured)

    @property
    def solved(self) -> int:
        """Bytes of what is solved at a block, beside what the block makes."""
        return 0

    @property
    def of_head(self) -> int:
        """Bytes of what the output projection makes, beside its weights."""
        return 0

    @property
    def of_block(self) -> int:
        """Bytes of what one block makes of one row, at most."""
        each = (FFN_WIDTHS * self.ffn + STREAM_WIDTHS * self.hidden) * self.itemsize
        matrices = MATRICES * self.heads * self.row**2 * self.itemsize
        return max(self.measured * each, self.row * GRADIENT * each + matrices)

    def states(self, tokens: int) -> int:
        """Bytes of what enters every block, and of the streams, where so many tokens go together."""
        each = tokens * self.hidden * self.itemsize
        return min(self.layers * each, HELD_STATES_BYTES) + 3 * each


@dataclass(frozen=True, slots=True)
class FitWork(Work):
    """What removal with adapters runs through the model: `row` and `measured` are of all rows that go together.

    Attributes:
        sources: Kept attention layers that an adapter reads.
        compensated: Whether output projections of kept sublayers are refitted.
        recalibrated: Whether the final norm is scaled: the words of the vocabulary then, else 0.
    """

    sources: int = 0
    compensated: bool = False
    recalibrated: int = 0

    @property
    def at_once(self) -> int:
        """All tokens: a fit takes them through one sublayer after the other."""
        return max(self.rows, self.measured)

    @property
    def solved(self) -> int:
        """The statistics of the widest fit, and what its solution takes."""
        return max(map(self._of_fit, (self.hidden * (1 + self.sources), self.ffn if self.compensated else 0)))

    @property
    def of_head(self) -> int:
        """Logits of a chunk of tokens."""
        return LOGITS * CHUNK_TOKENS * self.recalibrated * 4

    @property
    def of_block(self) -> int:
        """Bytes of what one block makes of the rows that go together."""
        return self.at_most * (FFN_WIDTHS * self.ffn + STREAM_WIDTHS * self.hidden) * self.itemsize

    @property
    def at_most(self) -> int:
        """Tokens that go through a block together."""
        return max(self.row, self.measured)

    def states(self, tokens: int) -> int:
        """Bytes of the streams of a fit and of what adapters read beside them."""
        each = tokens * self.hidden * self.itemsize
        fitted = min(FIT_STATES * each, HELD_STATES_BYTES) + self.sources * each
        return max(fitted, STREAMED_STATE_BYTES + each) + MEASURED_PLANS * self.measured_states

    @property
    def measured_states(self) -> int:
        """Bytes of one stream of what is measured."""
        return self.measured * self.hidden * self.itemsize

    def _of_fit(self, features: int) -> int:
        squares, crosses = SQUARES * features**2, CROSSES * features * self.hidden
        return 8 * (squares + crosses + TARGETS * self.hidden**2)


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
    made = work.of_block + work.solved
    held = max(ends * work.itemsize + work.of_head, block * work.itemsize + made)
    return Needed(
        RUNTIME_BYTES + sum(numbers.values()) * work.itemsize + max(made, work.of_head) + work.states(work.at_once),
        RUNTIME_BYTES + held + stored + work.states(tokens),
    )  # fmt: skip


def _stored(headers: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> int:
    spans = (headers[name]["data_offsets"] for name in names)
    return sum(end - start for start, end in spans)
