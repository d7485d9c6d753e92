"""What the model classes take from vLLM beyond its model modules. Tested with vLLM 0.32."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

__all__ = [
    "Attention",
    "ColumnParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "attention_classes",
    "attention_over",
    "idle_attention",
    "is_first_worker",
    "kv_heads_in_all",
    "longest_text",
    "replaced",
    "stock",
    "sum_over_ranks",
    "tensor_parallel_rank",
    "tensor_parallel_size",
]


def is_first_worker() -> bool:
    """Whether this process is the first of all tensor and pipeline ranks."""
    return get_pp_group().is_first_rank and get_tensor_model_parallel_rank() == 0


def tensor_parallel_size() -> int:
    """Ranks that share every layer."""
    return get_tensor_model_parallel_world_size()


def tensor_parallel_rank() -> int:
    """Which of them this is."""
    return get_tensor_model_parallel_rank()


def longest_text() -> int:
    """Tokens of the longest sequence that the model under construction will see."""
    return int(get_current_vllm_config().model_config.max_model_len)


def kv_heads_in_all() -> int:
    """KV heads of a layer of the model under construction, over all tensor-parallel ranks."""
    return int(get_current_vllm_config().model_config.get_total_num_kv_heads())


def sum_over_ranks(partial: Tensor) -> Tensor:
    """Sum of what every tensor-parallel rank holds, on every rank."""
    whole: Tensor = tensor_model_parallel_all_reduce(partial)
    return whole


def idle_attention(vllm_config: Any, name: str) -> nn.Module:
    """An attention layer without weights that nothing calls.

    vLLM 0.32 gives a pipeline stage as many cache blocks as its layers leave room for and divides by zero where there
    are none. With one such layer the stage holds one layer's share of a cache that the other stages bound.

    Args:
        vllm_config: Of the model.
        name: Of the layer, as if it belonged to a block.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layer: nn.Module = Attention(
        model.get_num_attention_heads(parallel),
        model.get_head_size(),
        1.0,
        num_kv_heads=model.get_num_kv_heads(parallel),
        cache_config=vllm_config.cache_config,
        prefix=name,
    )
    return layer


def attention_over(source: Any, name: str) -> nn.Module:
    """An attention layer that reads the KV cache of another one and has none of its own.

    Args:
        source: The `Attention` of an earlier block.
        name: Of the new layer; vLLM reads the block's number from it.
    """
    layer: nn.Module = Attention(
        source.num_heads,
        source.head_size,
        source.impl.scale,
        num_kv_heads=source.num_kv_heads,
        cache_config=get_current_vllm_config().cache_config,
        per_layer_sliding_window=source.sliding_window,
        prefix=name,
        kv_sharing_target_layer_name=source.layer_name,
    )
    return layer


def stock(name: str) -> Any:
    """A module of vLLM's models, such as `llama`."""
    return importlib.import_module(f"vllm.model_executor.models.{name}")


def attention_classes(target: str) -> list[str]:
    """Where a model's attention class (`module:Class`) and those it inherits from look up vLLM's `Attention`."""
    module, _, name = target.partition(":")
    prefix = "vllm.model_executor.models."
    homes = [home.__module__ for home in getattr(stock(module), name).__mro__ if home.__module__.startswith(prefix)]
    return [
        f"{home.removeprefix(prefix)}:Attention"
        for home in homes
        if hasattr(importlib.import_module(home), "Attention")
    ]


@contextmanager
def replaced(targets: Mapping[str, Any]) -> Iterator[None]:
    """Bind `module:name` of vLLM's models to other objects inside the `with`."""
    saved = [(stock(t.partition(":")[0]), t.partition(":")[2], value) for t, value in targets.items()]
    old = [getattr(module, name) for module, name, _ in saved]
    for module, name, value in saved:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(saved, old, strict=True):
            setattr(module, name, value)
