"""What is served, in numbers: sublayers, weights and KV cache, against the dense model."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pruning.models.checkpoint import Manifest
from pruning.plan import KINDS, Kind
from pruning.variants import cache_of, state_of
from server.engine.compat import EngineFacts

State = Literal["kept", "limited", "narrowed", "skipped", "removed", "emulated"]
STATES: tuple[State, ...] = get_args(State)
HeadState = Literal["full", "limited", "removed"]
HEAD_STATES: tuple[HeadState, ...] = get_args(HeadState)
CONTEXTS = (1024, 8192)  # and the longest
SMALL_CHUNK = 1024
NOTHING_SAVED = (
    "windows save no KV cache: vLLM's hybrid KV cache manager is off (--disable-hybrid-kv-cache-manager, or a KV "
    "connector that cannot do with it)"
)


@dataclass(frozen=True, slots=True)
class Context:
    """What requests of one length take.

    Attributes:
        tokens: Of one request.
        request_bytes: KV cache of one, between its steps.
        request_bytes_dense: The same in the dense model.
        fitting_tokens: Of such requests, all that the cache holds by what each reserves.
        fitting_tokens_dense: The same of the dense model in the same bytes.
    """

    tokens: int
    request_bytes: int
    request_bytes_dense: int
    fitting_tokens: int
    fitting_tokens_dense: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """The served model beside the dense one; for an unpruned model the two are the same.

    Attributes:
        blocks: State of each sublayer, one entry a block of the dense model.
        kv_bytes_per_token: KV cache bytes of one token, a draft's included; with windows the mean over a request as
            long as the longest.
        kv_bytes_per_token_dense: The same for the dense model without a draft.
        capacity_tokens: Tokens the running engine's KV cache holds.
        capacity_tokens_dense: Tokens of the dense model that fit into the same bytes.
        capacity_bytes: Bytes of the KV cache.
        weight_bytes: Of the weight files (0 when they are not local).
        weight_bytes_dense: The same for the dense model.
        emulation_parameters: Numbers in all emulation adapters.
        layer_heads: KV heads of an attention layer.
        full_heads: Block -> the KV heads that keep what the dense model keeps, of layers that are limited in part.
        contexts: What requests take at some lengths, shortest first; empty where nothing is limited.
        notes: What windows cost here, a sentence each.
        warnings: What windows do not save here, a sentence each.
    """

    blocks: tuple[dict[Kind, State], ...]
    kv_bytes_per_token: int
    kv_bytes_per_token_dense: int
    capacity_tokens: int
    capacity_tokens_dense: int
    capacity_bytes: int
    weight_bytes: int
    weight_bytes_dense: int
    emulation_parameters: int
    layer_heads: int = 0
    full_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    contexts: tuple[Context, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def count(self, kind: Kind, state: State) -> int:
        """Sublayers of a kind in a state."""
        return sum(block[kind] == state for block in self.blocks)

    def kv_heads(self) -> dict[HeadState, int]:
        """KV heads of all layers: as in the dense model, with a window in its place, or without a cache."""
        all_heads = {state: self.count("attention", state) * self.layer_heads for state in STATES}
        full = sum(map(len, self.full_heads.values()))
        return {
            "full": all_heads["kept"] + full,
            "limited": all_heads["limited"] - full,
            "removed": all_heads["removed"] + all_heads["emulated"],
        }

    def lines(self) -> list[str]:
        """What the server prints when it starts."""
        found = [
            f"KV cache: {self.capacity_tokens} tokens "
            f"(the dense model would hold {self.capacity_tokens_dense} in the same bytes)"
        ]
        if self.contexts:
            each = [f"{c.fitting_tokens:,} ({c.fitting_tokens_dense:,}) at {c.tokens:,}" for c in self.contexts]
            found.append(f"Tokens that fit (dense), by the length of a request: {'; '.join(each)}")
        return found + list(self.notes)


def sublayers(manifest: Manifest, limited: Collection[int] = ()) -> tuple[dict[Kind, State], ...]:
    """State of each sublayer of a pruned checkpoint, of which some attention layers are limited."""

    def state(block: int, kind: Kind) -> State:
        if kind == "attention" and block in limited:
            return "limited"
        return state_of(manifest.removed.get(f"{kind}.{block}"))

    return tuple({kind: state(block, kind) for kind in KINDS} for block in range(manifest.num_blocks))


def tensors(directory: Path) -> dict[str, dict[str, Any]]:
    """Headers of all safetensors files of a directory: name -> dtype, shape, offsets."""
    headers: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            headers |= json.loads(stream.read(length))
    headers.pop("__metadata__", None)
    return headers


def take_inventory(
    directory: Path, manifest: Manifest | None, facts: EngineFacts, draft: Manifest | None = None
) -> Inventory:
    """Put the numbers of the checkpoint and of the running engine together.

    Args:
        directory: What is served; may be a hub id, then weight bytes are 0.
        manifest: Of a pruned checkpoint, None for a dense model.
        facts: Of the running engine.
        draft: Manifest of the checkpoint that drafts, pruned from the same model; None: there is none.
    """
    one_layer = facts.kv_tensors * facts.kv_heads * facts.head_dim * facts.kv_dtype_bytes
    headers = tensors(directory) if directory.is_dir() else {}
    weights = sum(end - start for start, end in (h["data_offsets"] for h in headers.values()))
    adapters = sum(math.prod(header["shape"]) for name, header in headers.items() if ".emulation." in name)
    dense: dict[Kind, State] = {"attention": "kept", "ffn": "kept"}
    blocks = sublayers(manifest, facts.windows) if manifest else (dense,) * facts.layers
    drafting = sublayers(draft) if draft else ()
    sharing = sum(cache_of(one) == "full" and at.startswith("attention.") for each in (manifest, draft) if each
                  for at, one in each.removed.items())  # fmt: skip
    cached = sum(block["attention"] == "kept" for block in (*blocks, *drafting)) + sharing
    per_token, per_token_dense = one_layer * cached, one_layer * len(blocks)
    capacity_dense = facts.capacity_tokens * per_token // per_token_dense if per_token_dense else facts.capacity_tokens
    pool_bytes = facts.capacity_tokens * per_token
    contexts: tuple[Context, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    if facts.windows and facts.shape and facts.dense_shape:
        contexts = tuple(_context(tokens, facts, one_layer) for tokens in _lengths(facts.max_model_len))
        shape = facts.shape
        notes, warnings = (_notes(facts), ()) if facts.hybrid else ((), (NOTHING_SAVED,))
        per_token = contexts[-1].request_bytes // contexts[-1].tokens
        capacity_dense = contexts[-1].fitting_tokens_dense
        pool_bytes = facts.pool_blocks * shape.group_heads * shape.block_tokens * one_layer // shape.layer_heads
    return Inventory(
        blocks=blocks,
        kv_bytes_per_token=per_token,
        kv_bytes_per_token_dense=per_token_dense,
        capacity_tokens=facts.capacity_tokens,
        capacity_tokens_dense=capacity_dense,
        capacity_bytes=pool_bytes,
        weight_bytes=weights,
        weight_bytes_dense=manifest.sizes["weights_dense"] if manifest else weights,
        emulation_parameters=adapters,
        layer_heads=facts.kv_heads,
        full_heads=facts.full_heads,
        contexts=contexts,
        notes=notes,
        warnings=warnings,
    )


def _lengths(longest: int) -> list[int]:
    return [*(tokens for tokens in CONTEXTS if tokens < longest), longest]


def _context(tokens: int, facts: EngineFacts, one_layer: int) -> Context:
    assert facts.shape is not None
    assert facts.dense_shape is not None
    pool, layer = facts.pool_blocks * facts.shape.group_heads, facts.shape.layer_heads
    return Context(
        tokens,
        facts.shape.held(tokens) * one_layer // layer,
        facts.dense_shape.held(tokens) * one_layer // layer,
        pool * tokens // facts.shape.head_blocks(tokens),
        pool * tokens // facts.dense_shape.head_blocks(tokens),
    )


def _notes(facts: EngineFacts) -> tuple[str, ...]:
    """What windows cost in this engine beyond themselves."""
    shape, longest = facts.shape, facts.max_model_len
    assert shape is not None
    here, unhurried = shape.head_blocks(longest), replace(shape, in_flight_tokens=1).head_blocks(longest)
    if here == unhurried:
        return ()
    note = (
        f"Of what a request of {longest:,} tokens reserves, {1 - unhurried / here:.0%} is for the "
        f"{shape.in_flight_tokens:,} tokens that may be in flight in its limited layers"
    )
    small = replace(shape, in_flight_tokens=shape.in_flight_tokens * SMALL_CHUNK // facts.chunk_tokens)
    if facts.chunk_tokens > SMALL_CHUNK:
        fitting = facts.pool_blocks * shape.group_heads * longest // small.head_blocks(longest)
        note += f"; with --max-num-batched-tokens {SMALL_CHUNK} instead of {facts.chunk_tokens} {fitting:,} would fit"
    return (note,)
