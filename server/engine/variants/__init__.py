"""The vLLM twin of each kind of variant, one file a kind.

A checkpoint names kinds in `block_configs`: what takes the place of a removed sublayer by `emulation.kind`, what
changes one that stays by a key of its entry (`window` of attention, `skip` of an FFN). A new kind is a file with a
`VARIANT` and a line in a table here; somebody else's is a call of `add` in a plugin of vLLM. Targets are loaded when a
checkpoint first names them.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from pruning.errors import CheckpointError

STAND_INS: dict[str, str] = {
    "bias": "server.engine.variants.bias:VARIANT",
    "low_rank": "server.engine.variants.low_rank:VARIANT",
    "context": "server.engine.variants.low_rank:VARIANT",
    "kv_share": "server.engine.variants.kv_share:VARIANT",
}
CHANGES: dict[str, str] = {"window": "server.engine.variants.window:VARIANT"}
FFN_CHANGES: dict[str, str] = {"skip": "server.engine.variants.skip:VARIANT"}


def add(kind: str, target: str, *, changes: bool = False) -> None:
    """Register a kind of somebody else's.

    Args:
        kind: As `block_configs` names it.
        target: `module:attribute` of a `StandInVariant`, or of a `ChangeVariant`.
        changes: Whether it changes a sublayer that stays; else it takes the place of a removed one.

    Raises:
        ValueError: The kind is registered already.
    """
    if kind in STAND_INS or kind in CHANGES:
        raise ValueError(f"variant {kind!r} is registered already")
    (CHANGES if changes else STAND_INS)[kind] = target


def stand_in(spec: Mapping[str, Any]) -> Any:
    """The `StandInVariant` of a checkpoint's `emulation` entry.

    Raises:
        CheckpointError: Its kind is not known.
    """
    kind = spec["kind"]
    if kind not in STAND_INS:
        raise CheckpointError(f"emulation kind {kind!r} is not known to this version of Shoal; upgrade it")
    return _load(STAND_INS[kind])


def changes_of(entry: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each `ChangeVariant` that a kept sublayer's entry of `block_configs` names, with what the entry says of it."""
    for kind, target in CHANGES.items():
        if not entry["no_op"] and entry.get(kind) is not None:
            yield _load(target), entry[kind]


def ffn_changes_of(entry: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each `FFNChangeVariant` that a kept FFN's entry of `block_configs` names, with what the entry says of it."""
    for kind, target in FFN_CHANGES.items():
        if entry.get(kind) is not None and not entry["no_op"]:
            yield _load(target), entry[kind]


def unchanged(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A kept sublayer's entry of `block_configs` as if it were that of the dense model."""
    return {key: value for key, value in entry.items() if key not in CHANGES}


def full_heads_of(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """KV heads of a limited layer that keep every token all the same, by its entry of `block_configs`."""
    return tuple((entry.get("window") or {}).get("full_heads") or ())


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
