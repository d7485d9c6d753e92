"""Depth-pruned models in vLLM: the stock classes, with each block built without its removed sublayers.

While a stock model builds its blocks, the attention and FFN class names in its module are replaced by
`Absent` wherever `block_configs` says so: the dense module is never allocated and vLLM finds no `Attention` to give
a KV cache to. A stand-in (`stand_ins.py`) then takes the place, and the stock `forward` of the block runs unchanged.
A limited layer is the stock module too, built with another `Attention` (`variants/window.py`).
Blocks that share another's weights in the checkpoint are stock blocks here, with ordinary weights made while loading.

Families that vLLM runs through transformers' own code are in `transformers_models.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruning.families import FAMILIES, Family
from pruning.variants.shared import materialised
from server.engine import variants
from server.engine.loader import check_directory, check_eager, check_stage, check_units, lacks_attention
from server.engine.stand_ins import Absent, Place, build_emulation, connect_sources, install
from server.engine.vllm import (
    attention_classes,
    idle_attention,
    is_first_worker,
    replaced,
    stock,
    tensor_parallel_size,
)


@dataclass(frozen=True, slots=True)
class Seam:
    """Where a stock vLLM model can be opened.

    Attributes:
        causal: Class of the whole model, `module:Class` under `vllm.model_executor.models`.
        layers: Module whose `make_layers` builds the blocks.
        attention: Class its blocks construct for attention, `module:Class`, looked up at construction.
        ffn: The same for the FFN; several where blocks differ.
        fused: Whether blocks carry (update, residual).
        partial: Whether blocks sum their updates over tensor-parallel ranks themselves.
        ffn_place: Attribute of a block that holds the FFN module, where it is not the family's.
    """

    causal: str
    layers: str
    attention: str
    ffn: str | tuple[str, ...]
    fused: bool = True
    partial: bool = False
    ffn_place: str | None = None

    def constructs(self, kind: str) -> tuple[str, ...]:
        """The classes a block may construct for a sublayer ("attention" or "ffn")."""
        if kind == "attention":
            return (self.attention,)
        return (self.ffn,) if isinstance(self.ffn, str) else self.ffn


SEAMS: Mapping[str, Seam] = {
    "llama": Seam("llama:LlamaForCausalLM", "llama", "llama:LlamaAttention", "llama:LlamaMLP"),
    "mistral": Seam("mistral:MistralForCausalLM", "llama", "mistral:MistralAttention", "llama:LlamaMLP"),
    "phi3": Seam("phi3:Phi3ForCausalLM", "llama", "llama:LlamaAttention", "llama:LlamaMLP"),
    "qwen2": Seam("qwen2:Qwen2ForCausalLM", "qwen2", "qwen2:Qwen2Attention", "qwen2:Qwen2MLP"),
    "qwen3": Seam("qwen3:Qwen3ForCausalLM", "qwen2", "qwen3:Qwen3Attention", "qwen3:Qwen3MLP"),
    "gemma2": Seam("gemma2:Gemma2ForCausalLM", "gemma2", "gemma2:Gemma2Attention", "gemma2:Gemma2MLP"),
    "gemma3_text": Seam("gemma3:Gemma3ForCausalLM", "gemma3", "gemma3:Gemma3Attention", "gemma3:Gemma3MLP"),
    "mixtral": Seam(
        "mixtral:MixtralForCausalLM",
        "mixtral",
        "mixtral:MixtralAttention",
        "mixtral:MixtralMoE",
        ffn_place="block_sparse_moe",
    ),
    "qwen3_moe": Seam(
        "qwen3_moe:Qwen3MoeForCausalLM",
        "qwen3_moe",
        "qwen3_moe:Qwen3MoeAttention",
        ("qwen3_moe:Qwen3MoeSparseMoeBlock", "qwen3_moe:Qwen3MoeMLP"),
    ),
    "cohere": Seam(
        "commandr:CohereForCausalLM",
        "commandr",
        "commandr:CohereAttention",
        "commandr:CohereMLP",
        fused=False,
        partial=True,
    ),
    "granite": Seam(
        "granite:GraniteForCausalLM", "granite", "granite:GraniteAttention", "granite:GraniteMLP", fused=False
    ),
    "stablelm": Seam(
        "stablelm:StablelmForCausalLM", "stablelm", "stablelm:StablelmAttention", "stablelm:StablelmMLP", fused=False
    ),
}


def _pruning_layers(
    make_layers: Callable[..., Any], family: Family, seam: Seam, vllm_config: Any
) -> Callable[..., Any]:
    """`make_layers` that builds block i as `config.block_configs[i]` says."""
    config = vllm_config.model_config.hf_config

    def build(layer: Callable[..., nn.Module], prefix: str) -> nn.Module:
        spec = config.block_configs[int(prefix.rpartition(".")[2])]
        gone = [kind for kind in ("attention", "ffn") if spec[kind]["no_op"]]
        changes = [] if "attention" in gone else list(variants.changes_of(spec["attention"]))
        targets: dict[str, Any] = {name: Absent for kind in gone for name in seam.constructs(kind)}
        for variant, entry in changes:
            targets |= dict.fromkeys(attention_classes(seam.attention), variant.attention_class(entry))
        size = spec["ffn"].get("intermediate_size", config.intermediate_size)
        check_units(size, tensor_parallel_size(), prefix.rpartition(".")[2])
        with replaced(targets), _sized(config, size):
            block = layer(prefix=prefix)
        for variant, entry in changes:
            variant.prepare(getattr(block, family.attention), entry)
        share = 1 / tensor_parallel_size() if seam.partial else 1
        for kind in gone:
            before, after = family.norms(kind)
            place = family.attention if kind == "attention" else seam.ffn_place or family.ffn
            emulation = build_emulation(spec[kind]["emulation"], config.hidden_size, seam.fused)
            install(block, Place(place, before, after), emulation, fused=seam.fused, share=share)
        ffn, attention = (getattr(block, name) for name in (seam.ffn_place or family.ffn, family.attention))
        for variant, entry in variants.ffn_changes_of(spec["ffn"]):
            variant.prepare(ffn, attention, entry, config.hidden_size, share)
        return block

    def make(count: int, layer: Callable[..., nn.Module], prefix: str) -> Any:
        start, end, layers = make_layers(count, lambda prefix: build(layer, prefix), prefix=prefix)
        check_stage(config.block_configs, start, end, may_lack_attention=True)
        if lacks_attention(config.block_configs, start, end):
            name = f"{prefix}.{start}.{family.attention}.idle"
            getattr(layers[start], family.attention).idle = idle_attention(vllm_config, name)
        places = (family.attention, seam.ffn_place or family.ffn)
        connect_sources(layers, config.block_configs, places, start, end, partial=seam.partial)
        return start, end, layers

    return make


@contextmanager
def _sized(config: Any, size: int) -> Iterator[None]:
    """Let FFNs built inside the `with` have this many units."""
    usual, config.intermediate_size = config.intermediate_size, size
    try:
        yield
    finally:
        config.intermediate_size = usual


def _llama_block() -> type[nn.Module]:
    """A Llama block that looks its attention class up when built, not when defined."""
    llama = stock("llama")

    class Block(llama.LlamaDecoderLayer):  # type: ignore[name-defined]
        def __init__(self, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config, prefix, attn_layer_type=llama.LlamaAttention)

    return Block


def _define(family: Family) -> type[nn.Module]:
    if family.model_type not in SEAMS:
        from server.engine.transformers_models import define

        return define(family)
    seam = SEAMS[family.model_type]
    module, _, name = seam.causal.partition(":")
    base = getattr(stock(module), name)

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        if is_first_worker():
            check_directory(vllm_config.model_config.model, str(vllm_config.load_config.load_format))
        check_eager(vllm_config.model_config.hf_config.block_configs, eager=vllm_config.model_config.enforce_eager)
        make = _pruning_layers(stock(seam.layers).make_layers, family, seam, vllm_config)
        extra = {"layer_type": _llama_block()} if seam.attention == "llama:LlamaAttention" else {}
        with replaced({f"{seam.layers}:make_layers": make}):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix, **extra)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return set(base.load_weights(self, materialised(weights, self.config.block_configs, family)))

    return type(
        family.architecture,
        (base,),
        {
            "__init__": init,
            "load_weights": load_weights,
            "__module__": __name__,
            "__doc__": f"{family.name} without the sublayers that `config.block_configs` marks as removed.",
            "has_noops": True,
        },
    )


def __getattr__(name: str) -> type[nn.Module]:
    """Make `DepthPruned<Name>ForCausalLM` when vLLM first asks for it."""
    for family in FAMILIES.values():
        if family.architecture == name:
            globals()[name] = _define(family)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
