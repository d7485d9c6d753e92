"""The decoder families Shoal knows: where each keeps its blocks and sublayers. Data, not subclasses."""

from dataclasses import dataclass

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
        norm: Dotted path of the final norm.
        head: Dotted path of the output projection.
        vllm_module: Module under `vllm.model_executor.models` that serves it.
    """

    model_type: str
    name: str
    vllm_module: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def pruned_model_type(self) -> str:
        """`model_type` of a depth-pruned checkpoint."""
        return f"depth_pruned_{self.model_type}"

    @property
    def architecture(self) -> str:
        """Class name of a depth-pruned checkpoint, in transformers and in vLLM."""
        return f"DepthPruned{self.name}ForCausalLM"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", "llama"),
        Family("mistral", "Mistral", "mistral"),
        Family("qwen2", "Qwen2", "qwen2"),
        Family("qwen3", "Qwen3", "qwen3"),
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
