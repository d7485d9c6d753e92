"""The `nemotron-nas` format: vLLM's own `DeciLMForCausalLM`, so stock vLLM serves it without this package.

A block has attention or not, an FFN of its own size or not, biases for all or none; block 0 must keep its attention,
because the model adds nothing to the residual stream before it. vLLM reads `block_configs` by attribute, for which the
configuration class travels beside the weights (hence `--trust-remote-code`). Tested with vLLM 0.32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruning.export.formats import PrunedModel
from pruning.export.writing import write_weights

CONFIG_CLASS = "configuration_decilm.py"
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id",
    "pad_token_id", "dtype",
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}}
"""Families whose blocks DeciLM computes -> fields it needs besides."""


def refusal(pruned: PrunedModel) -> str | None:
    """What DeciLM does not compute."""
    family = pruned.family
    if family.model_type not in FAMILIES:
        return f"its blocks compute what Llama's do, and {family.name}'s differ; it holds {', '.join(FAMILIES)}"
    if (size := windows(pruned)) is not None:
        return f"it has no sliding window, and this {family.name} has one of {size} tokens"
    if pruned.block_configs[0]["attention"]["no_op"]:
        return "block 0 has to keep its attention; prune again with --keep 0"
    return None


def windows(pruned: PrunedModel) -> int | None:
    """Tokens of the sliding window that some attention has; None where there is none."""
    used = pruned.fields.get("use_sliding_window", pruned.family.model_type == "mistral")
    return pruned.fields.get("sliding_window") if used else None


def write(pruned: PrunedModel, directory: Path) -> int:
    """Write configuration, its class and weights; returns the bytes of the weights."""
    fields = {name: pruned.fields[name] for name in SAME if name in pruned.fields}
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    blocks = []
    for index, block in enumerate(pruned.block_configs):
        attention, size = not block["attention"]["no_op"], pruned.ffn_size(index)
        blocks.append(
            {
                "attention": {"no_op": not attention, "n_heads_in_group": heads // kv_heads if attention else None},
                "ffn": {"no_op": not size, "intermediate_size": size or None},
            }
        )
    document = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CONFIG_CLASS.removesuffix('.py')}.DeciLMConfig"},
        **fields,
        **FAMILIES[pruned.family.model_type],
        "block_configs": blocks,
    }
    (directory / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    source = Path(__file__).with_name("decilm_config.txt")
    (directory / CONFIG_CLASS).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return write_weights(pruned.tensors, directory)


def family_like(document: Mapping[str, Any]) -> str:
    """The family whose blocks compute what a configuration of this format describes."""
    return "qwen2" if document.get("qkv_bias") else "llama"


def kept_or_not(block: Mapping[str, Any], usual_size: int) -> dict[str, Any]:
    """An entry of this format's `block_configs` in the checkpoint format's form."""
    ffn: dict[str, Any] = {"no_op": block["ffn"]["no_op"], "emulation": None}
    if not ffn["no_op"] and block["ffn"]["intermediate_size"] != usual_size:
        ffn["intermediate_size"] = block["ffn"]["intermediate_size"]
    return {"attention": {"no_op": block["attention"]["no_op"], "emulation": None}, "ffn": ffn}
