"""Residual streams on their way through the blocks, all batches at each sublayer before any goes on to the next."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.forward.blocks import Arguments, Taps
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import Batches, batches
from pruning.plan import Sublayer

Wanted = Mapping[int, Collection[str]]
"""Block -> which attributes of its attention's tap later emulations read."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a sublayer reads in the dense model.

    Attributes:
        streams: Before it, batches of [b, T, D].
        arguments: What the model gives to its block, for each batch.
    """

    streams: Sequence[Tensor]
    arguments: Sequence[Mapping[str, Any]]


def enter(evaluator: Evaluator, copies: int = 2) -> tuple[Batches, list[Arguments]]:
    """What enters block 0, batches of [b, T, D], and what the model gives to every block, for each batch.

    Room is made for `copies` such streams. Arguments that repeat those of the batch before are the same objects.

    Raises:
        StorageError: Memory is not to hold them, and the cache cannot.
    """
    tokens = sum(batch.numel() for batch in evaluator.batches)
    width = evaluator.model.config.hidden_size * evaluator.model.dtype.itemsize
    streams, arguments = batches(tokens * width, copies), list[Arguments]()
    with evaluator.residency.embedding():
        for batch in evaluator.batches:
            hidden, given = evaluator.embed(batch)
            streams.append(hidden)
            arguments.append(arguments[-1] if arguments and _same(given, arguments[-1]) else given)
    return streams, arguments


def _same(one: Any, other: Any) -> bool:
    """Whether two nested arguments hold the same values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def last_block(evaluator: Evaluator, removed: Iterable[Sublayer], *, to_the_end: bool) -> int:
    """Where a fit ends: at the last block, or at the last that loses something."""
    return len(evaluator.blocks) - 1 if to_the_end else max(sublayer.block for sublayer in removed)


def advance(
    evaluator: Evaluator,
    sublayer: Sublayer,
    streams: Batches,
    arguments: Sequence[Arguments],
    emulation: nn.Module | None = None,
    *,
    taps: Sequence[Taps],
    wanted: Wanted | None = None,
) -> None:
    """Take streams through a sublayer, or through its emulation, in place.

    Args:
        evaluator: Of the dense model.
        sublayer: Which.
        streams: Before it; afterwards after it. Batches of [b, T, D].
        arguments: What the model gives to every block, for each batch.
        emulation: Takes the sublayer's place.
        taps: Where attention notes what it puts out, for each batch.
        wanted: What to keep of that; everything by default.
    """
    for number, (every, tap) in enumerate(zip(arguments, taps, strict=True)):
        streams[number] = evaluator.run_and_tap(sublayer, streams[number], every[sublayer.block], emulation, tap)
        if wanted is not None:
            trim(tap, sublayer, wanted)


def trim(taps: Taps, sublayer: Sublayer, wanted: Wanted) -> None:
    """Drop what attention noted for nobody; what entered the block stays, for the FFN beside it (parallel families)."""
    if sublayer.kind == "attention" and (tap := taps.get(sublayer.block)) is not None:
        for name in {"output", "keys", "values"}.difference(wanted.get(sublayer.block, ())):
            setattr(tap, name, None)


def forget_taps(taps: Sequence[Taps], wanted: Collection[int]) -> None:
    """At the end of a block, drop what attention put out in blocks that nothing reads any more."""
    for each in taps:
        for block, tap in list(each.items()):
            tap.entered = None
            if block not in wanted:
                del each[block]
