"""What is served, in numbers: sublayers, weights and KV cache, against the dense model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pruning.models.checkpoint import Manifest
from pruning.plan import KINDS, Kind
from pruning.variants import cache_of
from server.engine.compat import EngineFacts

State = Literal["kept", "removed", "emulated"]


@dataclass(frozen=True, slots=True)
class Inventory:
    """The served model beside the dense one; for an unpruned model the two are the same.

    Attributes:
        blocks: State of each sublayer, one entry a block of the dense model.
        kv_bytes_per_token: KV cache bytes of one token, a draft's included.
        kv_bytes_per_token_dense: The same for the dense model without a draft.
        capacity_tokens: Tokens the running engine's KV cache holds.
        weight_bytes: Of the weight files (0 when they are not local).
        weight_bytes_dense: The same for the dense model.
        emulation_parameters: Numbers in all emulation adapters.
    """

    blocks: tuple[dict[Kind, State], ...]
    kv_bytes_per_token: int
    kv_bytes_per_token_dense: int
    capacity_tokens: int
    weight_bytes: int
    weight_bytes_dense: int
    emulation_parameters: int

    @property
    def capacity_tokens_dense(self) -> int:
        """Tokens of the dense model that fit into the same bytes."""
        if not self.kv_bytes_per_token_dense:
            return self.capacity_tokens
        return self.capacity_tokens * self.kv_bytes_per_token // self.kv_bytes_per_token_dense

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.capacity_tokens * self.kv_bytes_per_token

    def count(self, kind: Kind, state: State) -> int:
        """Sublayers of a kind in a state."""
        return sum(block[kind] == state for block in self.blocks)

    def line(self) -> str:
        """What the server prints when it starts."""
        return (
            f"KV cache: {self.capacity_tokens} tokens "
            f"(the dense model would hold {self.capacity_tokens_dense} in the same bytes)"
        )


def sublayers(manifest: Manifest) -> tuple[dict[Kind, State], ...]:
    """State of each sublayer of a pruned checkpoint."""

    def state(block: int, kind: Kind) -> State:
        emulation = manifest.removed.get(f"{kind}.{block}")
        if emulation is None:
            return "kept"
        return "removed" if emulation == "none" else "emulated"

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
    blocks = sublayers(manifest) if manifest else (dense,) * facts.layers
    drafting = sublayers(draft) if draft else ()
    sharing = sum(cache_of(one) == "full" and at.startswith("attention.") for each in (manifest, draft) if each
                  for at, one in each.removed.items())  # fmt: skip
    cached = sum(block["attention"] == "kept" for block in (*blocks, *drafting)) + sharing
    return Inventory(
        blocks=blocks,
        kv_bytes_per_token=one_layer * cached,
        kv_bytes_per_token_dense=one_layer * len(blocks),
        capacity_tokens=facts.capacity_tokens,
        weight_bytes=weights,
        weight_bytes_dense=manifest.sizes["weights_dense"] if manifest else weights,
        emulation_parameters=adapters,
    )
