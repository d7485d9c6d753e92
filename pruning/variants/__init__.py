"""What a sublayer can become: one file a kind, and the table of all kinds.

    variant("low_rank").fit(job)          # the module that emulates one sublayer
    of_entry({"no_op": True, "emulation": {"kind": "bias"}})   # the variant that a checkpoint's entry names

The table holds what can be known without torch. A kind's own file holds the rest: its module, its fit, its entry in the
checkpoint, its bytes (`Variant` in `base.py` says what each must answer). Nothing else tests a kind by its name.
Another package adds a kind with `add`, or with an entry point in the group `shoal.variants` that calls it.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

from pruning.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from pruning.variants.base import Variant

REMOVED = "none"
"""The name in plans for a sublayer that nothing emulates."""


SKIPPING = "skip"
"""The name in plans for an FFN that some tokens skip."""

FUSED = "fused"
"""The name in manifests for a sublayer whose emulation is part of ordinary weights."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table.

    Attributes:
        target: `module:object`, a `Variant`; loaded when it is first used.
        help: One line for people.
        source: Paper or page.
        entry: How a checkpoint names it: `kind` of the `emulation` entry, or the key of an entry of its own. None: it
            leaves an ordinary sublayer, of which a checkpoint says nothing more.
        cache: What it keeps in the KV cache of each request: nothing, a window, or every token.
        unit: What it takes the place of: any sublayer, attention only, FFNs only, or whole blocks.
        fits: Whether it is fitted on calibration text.
        part: What there is less of where an FFN stays in part: it has fewer units, or runs for fewer tokens.
        streams: Whether one block in memory is enough to make it.
        reads: Whether it reads kept attention layers, as many as --sources says.
    """

    target: str
    help: str
    source: str
    entry: str | None
    cache: Literal["none", "window", "full"] = "none"
    unit: Literal["sublayer", "attention", "ffn", "block"] = "sublayer"
    fits: bool = True
    part: Literal["units", "tokens"] | None = None
    streams: bool = False
    reads: bool = False


VARIANTS: dict[str, Row] = {
    "window": Row(
        "pruning.variants.window:WINDOW", "attention to the last tokens only, with a planted sink",
        "arXiv 2309.17453; the planted sink is inferred", "window", cache="window", unit="attention",
        streams=True,
    ),
    "bias": Row(
        "pruning.variants.bias:BIAS", "a constant, the mean update", "arXiv 2407.16286", "bias", streams=True
    ),
    "self_only": Row(
        "pruning.variants.low_rank:SELF_ONLY", "attention of each token to itself alone; needs no text", "inferred",
        "low_rank", unit="attention", fits=False, streams=True,
    ),
    "low_rank": Row(
        "pruning.variants.low_rank:LOW_RANK", "an affine map of rank --rank", "arXiv 2407.16286", "low_rank",
        streams=True,
    ),
    "linear": Row(
        "pruning.variants.low_rank:LINEAR", "an affine map of full rank", "arXiv 2505.02819", "low_rank", streams=True
    ),
    "context": Row(
        "pruning.variants.context:CONTEXT", "a low-rank map that also reads kept attention layers", "inferred",
        "context", streams=True, reads=True,
    ),
    "kv_share": Row(
        "pruning.variants.kv_share:KV_SHARE", "attention over a kept layer's cache", "arXiv 2405.12981", "kv_share"
    ),
    "kv_share_low_rank": Row(
        "pruning.variants.kv_share:KV_SHARE_LOW_RANK", "the same with low-rank maps", "arXiv 2405.12981", "kv_share"
    ),
    "shared": Row(
        "pruning.variants.shared:SHARED_VARIANT",
        "a kept block's weights and low-rank differences: smaller files, but no KV cache and no time saved",
        "arXiv 2501.14713", "shared", cache="full", unit="block",
    ),
    "narrow": Row(
        "pruning.variants.narrow:NARROW", "an FFN of fewer units, as many as a weight budget lets each layer keep",
        "arXiv 2502.03460, 2301.00774", None, unit="ffn", part="units",
    ),
    "skip": Row(
        "pruning.variants.skip:SKIP", "an FFN that runs for some tokens only, with --ffn-skip; no weight changes",
        "arXiv 2404.03865; the predictor is inferred", "skip", unit="ffn", part="tokens",
    ),
}  # fmt: skip


def add(name: str, row: Row) -> None:
    """Add a kind.

    Raises:
        ValueError: The name is taken.
    """
    if name in VARIANTS or name == REMOVED:
        raise ValueError(f"there is a variant {name!r} already")
    VARIANTS[name] = row


def _add_installed() -> None:
    """Let other packages add their kinds."""
    for point in entry_points(group="shoal.variants"):
        point.load()()


_add_installed()


def row(name: str) -> Row:
    """The row of a kind, named as in a plan (`low_rank`) or as typed (`low-rank`).

    Raises:
        RecipeError: There is no such kind.
    """
    found = VARIANTS.get(name.replace("-", "_"))
    if found is None:
        known = [REMOVED, *(each.replace("_", "-") for each in VARIANTS)]
        near = difflib.get_close_matches(name.replace("_", "-"), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"unknown emulation {name!r}{hint} (kinds: {', '.join(known)})")
    return found


def variant(name: str) -> "Variant":
    """The variant of a kind.

    Raises:
        RecipeError: There is no such kind.
    """
    module, _, attribute = row(name).target.partition(":")
    found: Variant = getattr(importlib.import_module(module), attribute)
    return found


def replaces(kind: str) -> bool:
    """Whether a kind, or "none", takes the place of the whole sublayer, so that its own weights go."""
    return kind == REMOVED or not variant(kind).in_place


def changes_weights(kinds: Iterable[str]) -> bool:
    """Whether one of these kinds lets weights of the dense model go or changes them."""
    return any(kind in (REMOVED, FUSED) or variant(kind).changes_weights for kind in kinds)


def streams(kind: str) -> bool:
    """Whether one block in memory is enough to make a plan of a kind (as in a plan or as typed), or of "none"."""
    return kind == REMOVED or row(kind).streams


def reads(kind: str) -> bool:
    """Whether a kind (as in a plan or as typed), or "none", reads kept attention layers, as many as --sources says."""
    return kind != REMOVED and row(kind).reads


def cache_of(kind: str | None) -> Literal["none", "window", "full"]:
    """What a sublayer of this kind (as in a plan or as typed) keeps in the KV cache; None: it is kept as it is."""
    if kind is None:
        return "full"
    return "none" if kind in (REMOVED, FUSED) else row(kind).cache


def narrows(kind: str) -> bool:
    """Whether a kind (as in a plan or as typed) narrows FFNs: a budget then says how much of each goes."""
    return kind not in (REMOVED, FUSED) and row(kind).part == "units"


def skips(kind: str) -> bool:
    """Whether a kind (as in a plan or as typed) lets tokens skip FFNs: a rate then says how many."""
    return kind not in (REMOVED, FUSED) and row(kind).part == "tokens"


def state_of(kind: str | None) -> Literal["kept", "limited", "narrowed", "skipped", "emulated", "removed"]:
    """What a sublayer of this kind is called; None: it is kept as it is."""
    if kind is None:
        return "kept"
    if kind == REMOVED:
        return "removed"
    if narrows(kind):
        return "narrowed"
    if skips(kind):
        return "skipped"
    return "limited" if cache_of(kind) == "window" else "emulated"


def of_entry(entry: Mapping[str, Any]) -> "Variant | None":
    """The variant that a checkpoint's entry of one sublayer names; None where it is kept or simply gone.

    Raises:
        CheckpointError: The kind is not known.
    """
    spec = entry.get("emulation")
    kinds = [spec["kind"]] if spec is not None else [name for name in _own_entries() if entry.get(name)]
    for kind in kinds:
        for name, each in VARIANTS.items():
            if each.entry == kind:
                return variant(name)
        raise CheckpointError(f"emulation kind {kind!r} is not known to this version of Shoal; upgrade it")
    return None


def positions_of(entry: Mapping[str, Any]) -> int | None:
    """Positions that a kept attention layer with this entry keeps in its cache; None: all."""
    found = None if entry.get("no_op") else of_entry(entry)
    return None if found is None else found.positions(entry)


def full_heads_of(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """KV heads of a limited attention layer with this entry that keep every token."""
    return tuple(head for name in _own_entries() for head in (entry.get(name) or {}).get("full_heads", ()))


def _own_entries() -> list[str]:
    """Keys of a sublayer's entry that are a variant's own."""
    inside = [each for each in VARIANTS.values() if each.cache == "window" or each.part is not None]
    return [each.entry for each in inside if each.entry is not None]
