"""What becomes of each sublayer, and the bytes that follow from it. Pure Python."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pruning.errors import RecipeError

Kind = Literal["attention", "ffn"]
UnitKind = Literal["attention", "ffn", "block"]
EmulationKind = str
"""A kind of `pruning.variants`, or "none"."""
KINDS: tuple[Kind, Kind] = ("attention", "ffn")
FIRST_TOKENS = 4
"""Positions of a text that skip nothing: first tokens make the massive activations that all others rest on."""


@dataclass(frozen=True, slots=True, order=True)
class Sublayer:
    """One attention or FFN sublayer of one block."""

    block: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}.{self.block}"


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """What importance is measured of and what is removed at once: a sublayer, or a block with both of its own."""

    block: int
    kind: UnitKind

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The sublayers that go with it, first to last."""
        kinds: tuple[Kind, ...] = KINDS if self.kind == "block" else (self.kind,)
        return tuple(Sublayer(self.block, kind) for kind in kinds)

    def __str__(self) -> str:
        return f"{self.kind}.{self.block}"


def sublayers_of(units: Iterable[Unit]) -> list[Sublayer]:
    """All sublayers of several units, in the model's order."""
    return sorted({sublayer for unit in units for sublayer in unit.sublayers})


@dataclass(frozen=True, slots=True)
class Plan:
    """Which sublayers are no longer what they were, and what each became.

    Attributes:
        num_blocks: L, blocks of the dense model.
        removed: Sublayer -> kind of variant ("none": nothing takes its place).
        rank: r of the low-rank adapters.
        sources: k, kept attention layers that a `context` adapter reads.
        window: Positions that a limited layer keeps.
        full_heads: Block of a limited layer -> KV heads of it that keep every token; absent: none.
        units: Block of a narrower FFN -> units that it keeps.
        windows: Block of a limited layer -> positions that it keeps; absent: `window`.
    """

    num_blocks: int
    removed: Mapping[Sublayer, EmulationKind]
    rank: int = 0
    sources: int = 1
    window: int = 0
    full_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    units: Mapping[int, int] = field(default_factory=dict)
    windows: Mapping[int, int] = field(default_factory=dict)

    def blocks_kept(self) -> list[int]:
        """Blocks of which at least one sublayer does something, in order."""
        return [
            block
            for block in range(self.num_blocks)
            if any(self.removed.get(Sublayer(block, kind)) != "none" for kind in KINDS)
        ]

    def kept(self, kind: Kind) -> list[int]:
        """Blocks that keep a sublayer of this kind as it is."""
        return [block for block in range(self.num_blocks) if Sublayer(block, kind) not in self.removed]


def nearest_kept_attention(removed: Collection[Sublayer], block: int, count: int) -> tuple[int, ...]:
    """The last `count` blocks before `block` that keep their attention, nearest first; fewer where there are fewer."""
    kept = [earlier for earlier in range(block - 1, -1, -1) if Sublayer(earlier, "attention") not in removed]
    return tuple(kept[:count])


def parse_amount(amount: str | int, total: int | None, what: str) -> int:
    """Turn a count (`10`) or a share (`33%`) into a number of sublayers.

    Args:
        amount: Count or share, as typed.
        total: How many there are; None, where that is not known yet: only the text is judged then.
        what: Name for the message.

    Returns:
        A number from 1 to `total`; a share is rounded to the nearest count, half up.

    Raises:
        RecipeError: Malformed, zero, or more than there are.
    """
    text = str(amount).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    if not match or (not match[2] and "." in match[1]):
        raise RecipeError(f"--{what} {text!r} is neither a count such as 10 nor a share such as 33%")
    if match[2]:
        share = float(match[1])
        if share > 100:
            raise RecipeError(f"--{what} {text}: a share cannot be over 100%")
        count = int(share > 0) if total is None else int(total * share / 100 + 0.5)
    else:
        count = int(match[1])
    if count < 1:
        of = "" if total is None else f" of {total}"
        raise RecipeError(f"--{what} {text} removes nothing{of}; ask for at least 1")
    if total is not None and count > total:
        raise RecipeError(f"--{what} {text}: the model has only {total}")
    return count


def layers_within(budget: float, layers: int, left: float) -> int:
    """How many attention layers (or KV heads) must be limited or removed so that the rest fits; at least one.

    Args:
        budget: Share of the KV cache to keep, over 0 and under 1.
        layers: Of the model.
        left: Share of its cache that a limited one keeps; 0 for a removed one.

    Returns:
        The least count; it may be over `layers`, where the budget is out of reach.
    """
    return max(1, math.ceil(layers * (1 - budget) / (1 - left) - 1e-9))


def parse_share(share: str, what: str) -> float:
    """Turn `66%` into 0.66.

    Raises:
        RecipeError: Not a share between 0% and 100%.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", share.strip())
    if not match or not 0 < float(match[1]) < 100:
        raise RecipeError(f"--{what} {share!r} is not a share such as 66%, over 0% and under 100%")
    return float(match[1]) / 100


def parse_bytes(text: str, flag: str = "kv-memory") -> int:
    """Turn `16GiB` or `500MB` into bytes.

    Args:
        text: As typed.
        flag: Where, for the message.

    Raises:
        RecipeError: Not a size over 0 with its unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text.strip())
    size = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2])))
    if size < 1:
        raise RecipeError(f"--{flag} {text!r} is not a size such as 16GiB or 500MB")
    return size


def shortest(savings: Sequence[int], wanted: int) -> int | None:
    """How many of the first savings add up to at least `wanted`; None where all do not."""
    total = 0
    for count, saving in enumerate(savings, 1):
        total += saving
        if total >= wanted:
            return count
    return None


def window_part(size: int, share: float) -> int:
    """Positions of a share of a window; two at least."""
    return size if share == 1 else max(2, int(size * share))


def kv_bytes_of_request(head_bytes: int, full: int, limited: Mapping[int, int], context: int) -> int:
    """KV cache bytes of one request.

    Args:
        head_bytes: Of one token in one KV head: 2 (K and V) · head dim · dtype bytes.
        full: KV heads, of all layers together, that keep every token.
        limited: Positions of a window -> KV heads that keep them.
        context: L, tokens of the request.
    """
    return head_bytes * (full * context + sum(count * min(size, context) for size, count in limited.items()))


def lowest(scores: Mapping[Unit, float], count: int, among: Sequence[Unit]) -> list[Unit]:
    """The `count` units of least importance, least first, ties by position."""
    return sorted(among, key=lambda unit: (scores[unit], unit))[:count]


UNITS_MULTIPLE = 8


def padded_size(units: int) -> int:
    """Units of an FFN that tensor parallelism can split: a multiple of 8, at least 8."""
    return max(UNITS_MULTIPLE, -(-units // UNITS_MULTIPLE) * UNITS_MULTIPLE)
