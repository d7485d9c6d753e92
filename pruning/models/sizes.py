"""Bytes of weights and KV cache, before and after."""

from collections import Counter
from collections.abc import Mapping

import torch

from pruning.families import has_biases, head_dim, output_projection, places
from pruning.models.loading import DenseModel
from pruning.models.modeling import blocks_of
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer, kv_bytes_of_request, padded_size
from pruning.variants import REMOVED, cache_of, replaces, variant
from pruning.variants.base import Shape


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kv_head_bytes(dense: DenseModel) -> int:
    """KV cache bytes that one token takes in one KV head."""
    return 2 * head_dim(dense.model.config) * dense.model.dtype.itemsize


def sublayer_bytes(dense: DenseModel) -> dict[Sublayer, int]:
    """Weight bytes of every sublayer, its norms included; a mixture of experts may have dense FFNs between."""
    return {
        Sublayer(index, kind): sum(weight_bytes(getattr(block, name)) for name in places(dense.family, kind))
        for index, block in enumerate(blocks_of(dense.model, dense.family))
        for kind in KINDS
    }


def shape_of(dense: DenseModel, sublayer: Sublayer, rank: int, sources: int) -> Shape:
    """The sizes of one sublayer that the bytes of a variant follow from."""
    config = dense.model.config
    block = blocks_of(dense.model, dense.family)[sublayer.block]
    own = getattr(block, places(dense.family, sublayer.kind)[0])
    linear = {name: child for name, child in own.named_children() if isinstance(child, torch.nn.Linear)}
    output = output_projection(dense.family, sublayer.kind)
    return Shape(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        dtype_bytes=dense.model.dtype.itemsize,
        rank=rank,
        sources=sources,
        whole=sum(weight_bytes(getattr(block, name)) for name in places(dense.family, sublayer.kind)),
        maps=[(child.in_features, child.out_features, child.bias is not None) for child in linear.values()],
        output=list(linear).index(output) if output in linear else None,
    )


def fused_bytes(dense: DenseModel, sublayer: Sublayer, kind: EmulationKind, rank: int) -> int:
    """Weight bytes of the FFN units that emulate one sublayer, and of the norm before them where its FFN is gone.

    An upper bound: units are padded to a multiple for each FFN, not for each sublayer. `biases_bytes` come on top.
    """
    if kind == REMOVED:
        return 0
    size, biased = dense.model.config.hidden_size, has_biases(dense.model.config)
    needed = variant(kind).rank_when_fused(rank, size) or (0 if biased else 1)
    own = sublayer.kind == "ffn"
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


def saved_bytes(
    dense: DenseModel, removed: Mapping[Sublayer, EmulationKind], rank: int, sources: int, *, fused: bool,
    units: Mapping[int, int] | None = None,
) -> dict[Sublayer, int]:  # fmt: skip
    """Weight bytes that each sublayer saves, less those of what takes its place; `biases_bytes` are not in it."""
    left = units or {}
    each = sublayer_bytes(dense)

    def saved(sublayer: Sublayer, kind: EmulationKind) -> int:
        if kind == REMOVED:
            return each[sublayer]
        if fused and replaces(kind):
            return each[sublayer] - fused_bytes(dense, sublayer, kind, rank)
        return each[sublayer] - variant(kind).weight_bytes(
            shape_of(dense, sublayer, rank, sources).of_units(left.get(sublayer.block))
        )

    return {sublayer: saved(sublayer, kind) for sublayer, kind in removed.items()}


def kv_heads(plan: Plan, each: int) -> tuple[int, dict[int, int]]:
    """KV heads, of all layers together, that keep every token of a request, and how many keep a window of each size.

    Args:
        plan: The plan.
        each: K, KV heads of one layer.
    """
    full, limited = 0, Counter[int]()
    for block in range(plan.num_blocks):
        cache, mixed = cache_of(plan.removed.get(Sublayer(block, "attention"))), len(plan.full_heads.get(block, ()))
        full += each if cache == "full" else mixed
        if cache == "window":
            limited[plan.windows.get(block, plan.window)] += each - mixed
    return full, dict(limited)


def predicted_bytes(dense: DenseModel, plan: Plan, context: int, *, fused: bool = False) -> dict[str, int]:
    """Weight and KV bytes of the pruned model (at most, where its emulations are fused), and of the dense one.

    `kv_per_token` is what each further token of a long request takes; `kv_request` is what a request of `context`
    tokens takes, windows included.
    """
    whole, head, each = weight_bytes(dense.model), kv_head_bytes(dense), int(dense.model.config.num_key_value_heads)
    saved = sum(saved_bytes(dense, plan.removed, plan.rank, plan.sources, fused=fused, units=plan.units).values())
    if fused and any(emulation != REMOVED for emulation in plan.removed.values()):
        saved -= biases_bytes(dense)
    full, limited = kv_heads(plan, each)
    return {
        "weights_dense": whole,
        "weights": whole - saved,
        "kv_per_token_dense": head * each * plan.num_blocks,
        "kv_per_token": head * full,
        "context": context,
        "kv_request_dense": kv_bytes_of_request(head, each * plan.num_blocks, {}, context),
        "kv_request": kv_bytes_of_request(head, full, limited, context),
    }


def describe_bytes(sizes: Mapping[str, int]) -> str:
    """One line for people."""
    weights, kv = sizes["weights"] / sizes["weights_dense"], sizes["kv_request"] / sizes["kv_request_dense"]
    return (
        f"weights {sizes['weights'] / 2**20:.1f} MiB ({weights:.1%} of dense), KV cache of a request of "
        f"{sizes['context']} tokens {sizes['kv_request'] / 2**20:.1f} MiB ({kv:.1%} of dense)"
    )
