"""Offline stage: score, remove, emulate and export the layers of a decoder LLM.

Importing this package registers the `depth_pruned_*` configurations and models with transformers, lazily:
torch is imported only when a model is built.
"""

__version__ = "0.1.0"


def register() -> None:
    """Let `transformers.AutoConfig` and `AutoModelForCausalLM` load depth-pruned checkpoints (idempotent)."""
    from pruning.modeling import register_models

    register_models()
