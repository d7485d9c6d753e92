"""What the checkpoint says about itself, in numbers the server reports."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pruning.checkpoint import is_pruned, read_manifest
from pruning.plan import KINDS


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes in bytes, served and dense, and how many sublayers are in which state."""

    kv_per_token: int
    kv_per_token_dense: int
    weights: int
    weights_dense: int
    sublayers: Mapping[tuple[str, str], int]

    def dense_tokens(self, tokens: int) -> int:
        """Tokens the dense model would hold in the bytes that hold `tokens` of this one."""
        return tokens * self.kv_per_token // self.kv_per_token_dense


def read_facts(directory: Path) -> Facts | None:
    """Facts of a pruned checkpoint; None for any other model."""
    if not is_pruned(directory):
        return None
    manifest = read_manifest(directory)
    states: Counter[tuple[str, str]] = Counter()
    for kind in KINDS:
        for block in range(manifest.num_blocks):
            emulation = manifest.removed.get(f"{kind}.{block}")
            state = "kept" if emulation is None else "removed" if emulation == "none" else "emulated"
            states[kind, state] += 1
    sizes = manifest.sizes
    return Facts(
        sizes["kv_per_token"], sizes["kv_per_token_dense"], sizes["weights"], sizes["weights_dense"], dict(states)
    )
