"""The decoder families Shoal knows: where each keeps its blocks and sublayers. Data, not subclasses."""

from dataclasses import dataclass
from typing import Any

from pruning.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Names inside one model family.

    Attributes:
        model_type: transformers' `config.model_type`.
        name: CamelCase stem of its classes: `<name>ForCausalLM`, `<name>Config`.
        blocks: Dotted path of the block list.
        attention: Attribute of a block that holds the attention module.
        ffn: Attribute of a block that holds the FFN module.
        attention_norm: Norm before attention.
        ffn_norm: Norm before the FFN.
        attention_post_norm: Norm of attention's update, if the family has one.
        ffn_post_norm: Norm of the FFN's update, if the family has one.
        attention_output: Attribute of the attention module that holds its output projection.
        ffn_output: Attribute of the FFN module that holds its output projection.
        package: Package under `transformers.models`, where it is not `model_type`.
        config: Configuration class, where it is not `<name>Config`.
        update_scale: Config field that every update is multiplied by, if the family has one.
        norm: Dotted path of the final norm.
        head: Dotted path of the output projection.
    """

    model_type: str
    name: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    update_scale: str | None = None
    attention_output: str = "o_proj"
    ffn_output: str = "down_proj"
    package: str | None = None
    config: str | None = None
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def pruned_model_type(self) -> str:
        """`model_type` of a depth-pruned checkpoint."""
        return f"depth_pruned_{self.model_type}"

    @property
    def transformers_module(self) -> str:
        """Module with the dense family's classes."""
        return f"transformers.models.{self.package or self.model_type}"

    def norms(self, kind: str) -> tuple[str, str | None]:
        """Attributes of the norm before a sublayer ("attention" or "ffn") and of the norm after it."""
        if kind == "attention":
            return self.attention_norm, self.attention_post_norm
        return self.ffn_norm, self.ffn_post_norm

    def scale(self, config: Any) -> float:
        """What a block multiplies every update by before it adds it to the residual stream."""
        return 1.0 if self.update_scale is None else float(getattr(config, self.update_scale))

    @property
    def architecture(self) -> str:
        """Class name of a depth-pruned checkpoint, in transformers and in vLLM."""
        return f"DepthPruned{self.name}ForCausalLM"


def _sandwich(model_type: str, name: str, **fields: str) -> Family:
    """A family that normalises both what a sublayer reads and what it writes."""
    return Family(
        model_type,
        name,
        ffn_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
        **fields,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("phi3", "Phi3"),
        Family("granite", "Granite", update_scale="residual_multiplier"),
        Family("stablelm", "StableLm"),
        _sandwich("gemma2", "Gemma2"),
        _sandwich("gemma3_text", "Gemma3", package="gemma3", config="Gemma3TextConfig"),
    )
}


def family_of(model_type: str) -> Family:
    """Look a family up by `model_type`.

    Raises:
        ModelError: The family is not supported.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {model_type!r} is not supported; supported: {known}") from None
