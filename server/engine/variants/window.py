"""Attention that looks back a little, in vLLM: a sliding window and, where the checkpoint has one, a planted sink.

A query at position p sees the W positions p - W < q <= p. At every position p with p mod W = 0 the layer's key (after
rotation) and value are overwritten by two constants, before they are cached: any W positions in a row hold exactly one
such sink, so vLLM's ordinary sliding-window kernels and its cache for them serve as they are.

The attention module of a block is the stock one. It hands its `positions` to a `Planter` before it runs, and the
`Attention` it was built with reads them from there.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.vllm import Attention, longest_text, tensor_parallel_rank, tensor_parallel_size

SINKS = ("sink_key", "sink_value")


class Planter:
    """Where a limited layer's sinks go in the forward under way; a forward pre-hook on its attention module.

    Inside a compiled graph the positions go to the attention as any other tensor, which lets them go, so that the
    forward ends as it began.

    Args:
        size: W.
        module: The attention module, which holds the sinks [K, d] of this tensor-parallel rank.
    """

    def __init__(self, size: int, module: nn.Module) -> None:
        self.size, self.module = size, module
        self.here: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        """Note which tokens [tokens, 1, 1] are overwritten; the signature is that of a forward pre-hook.

        vLLM's own modules are given `positions` [tokens], those of transformers `position_ids` [1, tokens].
        """
        positions: Tensor = named["position_ids" if "position_ids" in named else "positions"]
        self.here = (positions.reshape(-1, 1, 1) % self.size) == 0

    def plant(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, K d] with the sinks in their places, [tokens, K, d]."""
        assert self.here is not None
        here, self.here = self.here, None
        sink_key, sink_value = (getattr(self.module, name) for name in SINKS)
        key, value = (states.view(-1, *sink_key.shape) for states in (key, value))
        return torch.where(here, sink_key.to(key.dtype), key), torch.where(here, sink_value.to(value.dtype), value)


class LimitedAttention(Attention):
    """vLLM's `Attention` with a window; a window as long as any text that can come is none.

    Args:
        size: W.
        arguments: Those of `Attention`.
    """

    def __init__(self, *arguments: Any, size: int, **named: Any) -> None:
        limit = size if size < longest_text() else None
        super().__init__(*arguments, **named | {"per_layer_sliding_window": limit})
        self.planter: Planter | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        """Attention output [tokens, H d]."""
        if self.planter is not None:
            key, value = self.planter.plant(key, value)
        output: Tensor = super().forward(query, key, value, *others, **named)
        return output


def load_heads(parameter: Tensor, loaded: Tensor) -> None:
    """Fill a parameter [K of this rank, d] from a tensor of all heads [K, d]; ranks may share a head."""
    first = tensor_parallel_rank() * loaded.shape[0] // tensor_parallel_size()
    parameter.data.copy_(loaded[first : first + parameter.shape[0]])


class Window:
    """The kind `window`: `{"size": W, "sink": true|false}`."""

    def attention_class(self, spec: Mapping[str, Any]) -> Callable[..., nn.Module]:
        """What a block constructs in the place of vLLM's `Attention`."""
        return partial(LimitedAttention, size=int(spec["size"]))

    def prepare(self, module: nn.Module, spec: Mapping[str, Any]) -> None:
        """Give an attention module its sinks, under the names they have in the checkpoint."""
        if not spec["sink"]:
            return
        attention: Any = module.attn
        for name in SINKS:
            sink = nn.Parameter(torch.zeros(attention.num_kv_heads, attention.head_size), requires_grad=False)
            sink.weight_loader = load_heads
            module.register_parameter(name, sink)
        attention.planter = Planter(int(spec["size"]), module)
        module.register_forward_pre_hook(attention.planter, with_kwargs=True)


VARIANT = Window()
