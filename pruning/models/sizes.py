"""Bytes of weights and KV cache, before and after."""

from collections.abc import Mapping

import torch

from pruning.families import head_dim
from pruning.models.loading import DenseModel
from pruning.models.modeling import blocks_of, output_projection, places
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer, kv_bytes_per_token
from pruning.recovery.units import has_biases, padded_size
from pruning.variants.shared import SHARED, SharedEmulation, linear_maps


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kv_bytes(dense: DenseModel, kept_attention: int) -> int:
    """KV cache bytes per token with so many attention layers."""
    config = dense.model.config
    return kv_bytes_per_token(kept_attention, config.num_key_value_heads, head_dim(config), dense.model.dtype.itemsize)


def sublayer_bytes(dense: DenseModel) -> dict[Sublayer, int]:
    """Weight bytes of every sublayer, its norms included; a mixture of experts may have dense FFNs between."""
    return {
        Sublayer(index, kind): sum(weight_bytes(getattr(block, name)) for name in places(dense.family, kind))
        for index, block in enumerate(blocks_of(dense.model, dense.family))
        for kind in KINDS
    }


def adapter_bytes(dense: DenseModel, kind: EmulationKind, rank: int, sources: int = 1) -> int:
    """Weight bytes of what emulates one sublayer; an upper bound for `self_only` and near block 0."""
    config = dense.model.config
    size, width = config.hidden_size, config.num_attention_heads * head_dim(config)
    numbers = {
        "none": 0, "bias": size, "low_rank": (2 * rank + 1) * size, "linear": (2 * size + 1) * size,
        "context": ((2 + sources) * rank + 1) * size,
        "self_only": (2 * config.num_key_value_heads * head_dim(config) + 1) * size,
        "kv_share": (2 * width + 2 * rank + 1) * size + width,
        "kv_share_low_rank": (3 * rank + 1) * size + (2 * rank + 1) * width,
    }  # fmt: skip
    return numbers[kind] * dense.model.dtype.itemsize


def fused_bytes(dense: DenseModel, sublayer: Sublayer, kind: EmulationKind, rank: int) -> int:
    """Weight bytes of the FFN units that emulate one sublayer, and of the norm before them where its FFN is gone.

    An upper bound: units are padded to a multiple for each FFN, not for each sublayer. `biases_bytes` come on top.
    """
    size, biased = dense.model.config.hidden_size, has_biases(dense.model.config)
    needed = {"none": 0, "bias": 0 if biased else 1, "low_rank": rank, "linear": size}[kind]
    own = sublayer.kind == "ffn" and kind != "none"
    units = padded_size(needed) if needed or own else 0
    block = blocks_of(dense.model, dense.family)[sublayer.block]
    norms = sum(weight_bytes(getattr(block, name)) for name in places(dense.family, "ffn")[1:]) if own else 0
    return units * (3 * size + 2 * biased) * dense.model.dtype.itemsize + norms


def biases_bytes(dense: DenseModel) -> int:
    """Weight bytes of the biases that fusing gives to all FFNs of a model where it gives them to one."""
    config = dense.model.config
    if not has_biases(config) or config.mlp_bias:
        return 0
    return config.num_hidden_layers * (2 * config.intermediate_size + config.hidden_size) * dense.model.dtype.itemsize


def saved_by_sharing(dense: DenseModel, sublayer: Sublayer, rank: int) -> int:
    """Weight bytes of a sublayer's linear maps less those of its differences from another's; all else of it stays."""
    block = blocks_of(dense.model, dense.family)[sublayer.block]
    own = getattr(block, places(dense.family, sublayer.kind)[0])
    with torch.device("meta"):
        shared = SharedEmulation.of(own, 0, rank, output_projection(dense.family, sublayer.kind)).to(dense.model.dtype)
    return sum(weight_bytes(linear) for linear in linear_maps(own).values()) - weight_bytes(shared)


def saved_bytes(
    dense: DenseModel, removed: Mapping[Sublayer, EmulationKind], rank: int, sources: int, *, fused: bool
) -> dict[Sublayer, int]:
    """Weight bytes that each removed sublayer saves, less those of what emulates it; `biases_bytes` are not in it."""
    each = sublayer_bytes(dense)

    def saved(sublayer: Sublayer, kind: EmulationKind) -> int:
        if kind == SHARED:
            return saved_by_sharing(dense, sublayer, rank)
        if fused:
            return each[sublayer] - fused_bytes(dense, sublayer, kind, rank)
        return each[sublayer] - adapter_bytes(dense, kind, rank, sources)

    return {sublayer: saved(sublayer, kind) for sublayer, kind in removed.items()}


def predicted_bytes(dense: DenseModel, plan: Plan, *, fused: bool = False) -> dict[str, int]:
    """Weight and KV bytes of the pruned model (at most, where its emulations are fused), and of the dense one."""
    whole = weight_bytes(dense.model)
    saved = sum(saved_bytes(dense, plan.removed, plan.rank, plan.sources, fused=fused).values())
    if fused and any(emulation != "none" for emulation in plan.removed.values()):
        saved -= biases_bytes(dense)
    return {
        "weights_dense": whole,
        "weights": whole - saved,
        "kv_per_token_dense": kv_bytes(dense, plan.num_blocks),
        "kv_per_token": kv_bytes(dense, len(plan.kept("attention"))),
    }


def describe_bytes(sizes: dict[str, int]) -> str:
    """One line for people."""
    weights, kv = (
        sizes["weights"] / sizes["weights_dense"],
        sizes["kv_per_token"] / sizes["kv_per_token_dense"],
    )
    return (
        f"weights {sizes['weights'] / 2**20:.1f} MiB ({weights:.1%} of dense), "
        f"KV cache {sizes['kv_per_token']} bytes per token ({kv:.1%} of dense)"
    )
