"""vLLM's entry point: makes `depth_pruned_*` checkpoints known. Imports neither torch nor vLLM's internals early."""

from pruning.families import FAMILIES


def register() -> None:
    """Register configurations and lazy model classes in this process (idempotent; vLLM calls it in every process)."""
    from vllm import ModelRegistry

    from pruning.models.configuration import register_configs
    from server.engine.cache_groups import install

    register_configs()
    install()
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES.values():
        if family.architecture not in known:
            ModelRegistry.register_model(family.architecture, f"server.engine.models:{family.architecture}")
