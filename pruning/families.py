"""The decoder families Shoal knows: where each keeps its blocks and sublayers. Data, not subclasses."""

from collections.abc import Sequence
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
        attention_norm: Norm before attention, if the family has one.
        ffn_norm: Norm before the FFN, if the family has one.
        attention_post_norm: Norm of attention's update, if the family has one.
        ffn_post_norm: Norm of the FFN's update, if the family has one.
        attention_output: Attribute of the attention module that holds its output projection.
        ffn_output: Attribute of the FFN module that holds its output projection, if it is one matrix.
        package: Package under `transformers.models`, where it is not `model_type`.
        config: Configuration class, where it is not `<name>Config`.
        decoder: Class of the model without output projection, where it is not `<name>Model`.
        update_scale: Config field that every update is multiplied by, if the family has one.
        parallel: Whether attention and FFN read the same input, through `attention_norm`, and are added at once.
        refused: Config fields that change the architecture in ways that are not supported when set.
        shares_cache: Whether a `kv_share` emulation can read its KV cache: one rotation for all heads, one scale, no
            soft cap, and keys as they are cached are what queries meet.
        norm: Dotted path of the final norm.
        head: Dotted path of the output projection.
    """

    model_type: str
    name: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    ffn_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    ffn_post_norm: str | None = None
    update_scale: str | None = None
    parallel: bool = False
    refused: tuple[str, ...] = ()
    attention_output: str = "o_proj"
    ffn_output: str | None = "down_proj"
    package: str | None = None
    config: str | None = None
    decoder: str | None = None
    shares_cache: bool = False
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

    def norms(self, kind: str) -> tuple[str | None, str | None]:
        """Attributes of the norms that are a sublayer's own ("attention" or "ffn"): before it, and after it."""
        if self.parallel:
            return None, None  # the one norm stays for the other
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


def _sandwich(model_type: str, name: str, **fields: Any) -> Family:
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
        Family("llama", "Llama", shares_cache=True),
        Family("mistral", "Mistral", shares_cache=True),
        Family("qwen2", "Qwen2", shares_cache=True),
        Family("qwen3", "Qwen3", shares_cache=True),
        Family("phi3", "Phi3"),
        Family("granite", "Granite", update_scale="residual_multiplier", shares_cache=True),
        Family("stablelm", "StableLm", refused=("use_parallel_residual", "qk_layernorm")),
        Family("cohere", "Cohere", ffn_norm=None, parallel=True),
        Family("mixtral", "Mixtral", ffn_output=None),
        Family("qwen3_moe", "Qwen3Moe", ffn_output=None),
        Family(
            "olmo2",
            "Olmo2",
            attention_norm=None,
            ffn_norm=None,
            attention_post_norm="post_attention_layernorm",
            ffn_post_norm="post_feedforward_layernorm",
        ),
        _sandwich("gemma2", "Gemma2"),
        _sandwich("gemma3_text", "Gemma3", package="gemma3", config="Gemma3TextConfig", decoder="Gemma3TextModel"),
    )
}


def family_of(config: Any) -> Family:
    """Look up the family of a model's configuration.

    Raises:
        ModelError: The family, or a variant of it, is not supported.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model family {config.model_type!r} is not supported; supported: {known}")
    family = FAMILIES[config.model_type]
    for field in family.refused:
        if getattr(config, field, None):
            raise ModelError(f"{config.model_type} models with {field} are not supported")
    return family


def head_dim(config: Any) -> int:
    """d, the width of one attention head; not every configuration states it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def keep_blocks(config: Any, indices: Sequence[int]) -> None:
    """Make a configuration describe only some of its blocks, renumbered 0, 1, ..., in place."""
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    if hasattr(config, "mlp_only_layers"):  # mixture of experts: which blocks have an ordinary FFN
        step = config.decoder_sparse_step
        dense = [i in config.mlp_only_layers or (i + 1) % step != 0 for i in range(config.num_hidden_layers)]
        config.mlp_only_layers = [new for new, old in enumerate(indices) if dense[old]]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(indices)


def places(family: Family, kind: str) -> tuple[str, ...]:
    """Attribute names of a sublayer's module and of the norms that are its own."""
    module = family.attention if kind == "attention" else family.ffn
    return (module, *(norm for norm in family.norms(kind) if norm))


def output_projection(family: Family, kind: str) -> str | None:
    """Attribute of a sublayer that holds its output projection; None where experts share the work."""
    return family.attention_output if kind == "attention" else family.ffn_output


def own_window(config: Any, block: int) -> int | None:
    """Positions that a block's attention sees by the family's own design; None where it sees all."""
    size = getattr(config, "sliding_window", None)
    if not size or getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None)
    return int(size) if not types or types[block] == "sliding_attention" else None


def has_biases(config: Any) -> bool:
    """Whether a family's FFNs can have biases (its configuration says so by `mlp_bias`)."""
    return hasattr(config, "mlp_bias")
