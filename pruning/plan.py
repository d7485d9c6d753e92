"""What is kept, removed or emulated, and the bytes that follow from it. Pure Python."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pruning.errors import RecipeError

Kind = Literal["attention", "ffn"]
UnitKind = Literal["attention", "ffn", "block"]
EmulationKind = Literal[
    "none", "bias", "self_only", "low_rank", "linear", "context", "kv_share", "kv_share_low_rank", "shared"
]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")


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
    """Which sublayers are gone, and by what each is emulated.

    Attributes:
        num_blocks: L, blocks of the dense model.
        removed: Sublayer -> kind of emulation ("none": nothing takes its place).
        rank: r of the low-rank adapters.
        sources: k, kept attention layers that a `context` adapter reads.
    """

    num_blocks: int
    removed: Mapping[Sublayer, EmulationKind]
    rank: int = 0
    sources: int = 1

    def state(self, sublayer: Sublayer) -> Literal["kept", "removed", "emulated"]:
        """State of one sublayer."""
        if sublayer not in self.removed:
            return "kept"
        return "removed" if self.removed[sublayer] == "none" else "emulated"

    def blocks_kept(self) -> list[int]:
        """Blocks that keep or emulate at least one sublayer, in order."""
        return [
            block
            for block in range(self.num_blocks)
            if any(self.state(Sublayer(block, kind)) != "removed" for kind in KINDS)
        ]

    def kept(self, kind: Kind) -> list[int]:
        """Blocks that run a sublayer of this kind, with its own weights or (`shared`) with another block's."""
        return [b for b in range(self.num_blocks) if self.removed.get(Sublayer(b, kind), "shared") == "shared"]


def nearest_kept_attention(removed: Collection[Sublayer], block: int, count: int) -> tuple[int, ...]:
    """The last `count` blocks before `block` that keep their attention, nearest first; fewer where there are fewer."""
    kept = [earlier for earlier in range(block - 1, -1, -1) if Sublayer(earlier, "attention") not in removed]
    return tuple(kept[:count])


def parse_amount(amount: str | int, total: int, what: str) -> int:
    """Turn a count (`10`) or a share (`33%`) into a number of sublayers.

    Args:
        amount: Count or share, as typed.
        total: How many there are.
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
        count = int(total * share / 100 + 0.5)
    else:
        count = int(match[1])
    if count < 1:
        raise RecipeError(f"--{what} {text} removes nothing of {total}; ask for at least 1")
    if count > total:
        raise RecipeError(f"--{what} {text}: the model has only {total}")
    return count


def parse_share(share: str, what: str) -> float:
    """Turn `66%` into 0.66.

    Raises:
        RecipeError: Not a share between 0% and 100%.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", share.strip())
    if not match or not 0 < float(match[1]) < 100:
        raise RecipeError(f"--{what} {share!r} is not a share such as 66%, over 0% and under 100%")
    return float(match[1]) / 100


def shortest(savings: Sequence[int], wanted: int) -> int | None:
    """How many of the first savings add up to at least `wanted`; None where all do not."""
    total = 0
    for count, saving in enumerate(savings, 1):
        total += saving
        if total >= wanted:
            return count
    return None


def kv_bytes_per_token(kept_attention: int, num_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """KV cache bytes one token takes: 2 (K and V) · kept attention layers · K heads · head dim · dtype bytes."""
    return 2 * kept_attention * num_kv_heads * head_dim * dtype_bytes


def lowest(scores: Mapping[Unit, float], count: int, among: Sequence[Unit]) -> list[Unit]:
    """The `count` units of least importance, least first, ties by position."""
    return sorted(among, key=lambda unit: (scores[unit], unit))[:count]
