"""What one replica needs, from the bytes of its checkpoint: for a Kubernetes manifest or a Compose file."""

from dataclasses import dataclass
from pathlib import Path

from pruning.errors import CheckpointError
from pruning.models.checkpoint import is_pruned, read_manifest
from pruning.variants import cache_of

GIB = 2**30
# Python, torch and vLLM in the server and its engine process: SmolLM2-135M on a CPU had 3.56 GiB resident with 0.47 GiB
# of weights and a pool of 1 GiB, which leaves 2.09 (pages that processes share are counted in each).
RUNTIME_BYTES = 9 * GIB // 4
# An allowance, not a measurement: activations grow with the model.
ACTIVATIONS_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Resources:
    """Requests of one replica.

    Attributes:
        weight_bytes: Of all weight files.
        resident_bytes: Of the weights once loaded: blocks that share weights in the files do not share them there.
        memory_bytes: Weights, KV pool and run time on a CPU, rounded up to whole GiB; request and limit alike.
        kv_tokens: Tokens the pool holds, None for a dense model.
        storage_bytes: Of a volume for the checkpoint and, while it is exported, a second copy.
    """

    weight_bytes: int
    resident_bytes: int
    memory_bytes: int
    kv_tokens: int | None
    storage_bytes: int

    def render(self, cores: int) -> str:
        """The `resources` of a container as YAML, with what they are made of as comments."""
        memory, storage = self.memory_bytes // GIB, self.storage_bytes // GIB
        tokens = f"; the KV pool holds about {self.kv_tokens} tokens" if self.kv_tokens is not None else ""
        return (
            f"# weights {self.resident_bytes / GIB:.2f} GiB{tokens}; volume: {storage}Gi\n"
            "resources:\n"
            f'  requests: {{cpu: "{cores}", memory: {memory}Gi}}\n'
            f'  limits: {{cpu: "{2 * cores}", memory: {memory}Gi}}'
        )


def plan_resources(directory: Path, kv_gib: float) -> Resources:
    """Derive the requests of one replica on a CPU.

    Args:
        directory: A checkpoint, or a dense model directory with safetensors files.
        kv_gib: Size of the KV pool, GiB (`VLLM_CPU_KVCACHE_SPACE`).

    Raises:
        CheckpointError: No weights there, or a damaged manifest.
    """
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{directory} holds no *.safetensors; give a checkpoint or a model directory")
    manifest = read_manifest(directory) if is_pruned(directory) else None
    per_token = manifest.sizes["kv_per_token"] if manifest else 0
    resident = (
        manifest.sizes["weights_dense"]
        if manifest and any(cache_of(kind) == "full" for kind in manifest.removed.values())
        else weights
    )
    needed = resident * (1 + ACTIVATIONS_SHARE) + kv_gib * GIB + RUNTIME_BYTES
    return Resources(
        weight_bytes=weights,
        resident_bytes=resident,
        memory_bytes=whole_gib(needed),
        kv_tokens=int(kv_gib * GIB) // per_token if per_token else None,
        storage_bytes=whole_gib(2.2 * weights),
    )


def whole_gib(size: float) -> int:
    """Bytes rounded up to whole GiB."""
    return -int(-size // GIB) * GIB
