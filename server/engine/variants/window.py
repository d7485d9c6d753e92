"""Attention that looks back a little, in vLLM: a sliding window and, where the checkpoint has one, a planted sink.

A query at position p sees the W positions p - W < q <= p. At every position p > 0 with p mod W = 0 the layer's key
(after rotation) and value are overwritten by two constants, before they are cached: any W positions in a row hold
exactly one such sink, or the text's first token, so vLLM's ordinary sliding-window kernels and its cache for them serve
as they are.

The attention module of a block is the stock one. It hands its `positions` to a `Planter` before it runs, and the
`Attention` it was built with reads them from there.

Where a checkpoint names KV heads that keep every token (`full_heads`), the module is built with a `MixedAttention`: two
`Attention`s, one for those heads and one for the others.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.drafting import part_metadata
from server.engine.loader import full_heads_of_ranks
from server.engine.vllm import (
    Attention,
    kv_heads_in_all,
    longest_text,
    tensor_parallel_rank,
    tensor_parallel_size,
)

SINKS = ("sink_key", "sink_value")


class Planter:
    """Where a limited layer's sinks go in the forward under way; a forward pre-hook on its attention module.

    Inside a compiled graph the positions go to the attention as any other tensor, which lets them go, so that the
    forward ends as it began.

    Args:
        size: W.
        module: The attention module, which holds the sinks [K, d] of the limited heads of this tensor-parallel rank.
    """

    def __init__(self, size: int, module: nn.Module) -> None:
        self.size, self.module = size, module
        self.here: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        """Note which tokens [tokens, 1, 1] are overwritten; the signature is that of a forward pre-hook.

        vLLM's own modules are given `positions` [tokens], those of transformers `position_ids` [1, tokens].
        """
        positions: Tensor = named["position_ids" if "position_ids" in named else "positions"]
        positions = positions.reshape(-1, 1, 1)
        self.here = (positions % self.size == 0) & (positions > 0)

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


class MixedAttention(nn.Module):
    """In the place of one `Attention`: one for the KV heads that keep every token, one for those with a window.

    Query heads go with their KV head: g h to g (h + 1) - 1 with head h. Heads that stand side by side are read where
    the fused projection has left them; only what is scattered is copied.

    Args:
        full: Of the heads that keep every token.
        limited: Of the others.
        heads: The KV heads of `full`, of those of this tensor-parallel rank.
    """

    def __init__(self, full: Attention, limited: Attention, heads: Sequence[int]) -> None:
        super().__init__()
        self.full, self.limited = full, limited
        self.heads, self.head_size = tuple(heads), full.head_size
        self.num_kv_heads = full.num_kv_heads + limited.num_kv_heads
        self.num_heads = full.num_heads + limited.num_heads
        self.others = tuple(head for head in range(self.num_kv_heads) if head not in self.heads)
        self.order = pieces(self.heads, self.num_kv_heads)
        self.runs = [[(start, end) for full, start, end, _ in self.order if full == own] for own in (False, True)]
        for scale in ("q_scale", "k_scale", "v_scale", "prob_scale"):  # of a quantised cache: one a layer, in both
            if hasattr(full, scale):
                setattr(self, scale, getattr(full, scale))
                setattr(limited, scale, getattr(full, scale))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [tokens, H d]."""
        states = [each.view(each.shape[0], self.num_kv_heads, -1) for each in (query, key, value)]
        outputs = []
        for part, runs in zip((self.limited, self.full), self.runs, strict=True):
            output = part(*(gather(each, runs) for each in states))
            outputs.append(output.view(output.shape[0], part.num_kv_heads, -1))
        ordered = [outputs[full][:, at : at + end - start] for full, start, end, at in self.order]
        return torch.cat(ordered, 1).flatten(1)


def pieces(heads: Sequence[int], count: int) -> list[tuple[bool, int, int, int]]:
    """Runs of heads that are all full or all limited, in order.

    Args:
        heads: The full ones.
        count: Of all heads.

    Returns:
        (whether it is full, first head, one past the last, how many of its kind came before) of each run.
    """
    found: list[tuple[bool, int, int, int]] = []
    seen = [0, 0]
    for head in range(count):
        full = head in heads
        if found and found[-1][0] == full:
            found[-1] = (full, found[-1][1], head + 1, found[-1][3])
        else:
            found.append((full, head, head + 1, seen[full]))
        seen[full] += 1
    return found


def gather(states: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Some heads of [tokens, K, n]; a view where they stand side by side."""
    some = [states[:, start:end] for start, end in runs]
    return some[0] if len(some) == 1 else torch.cat(some, 1)


def mixed(size: int, full_heads: Sequence[int], num_heads: int, head_size: int, scale: float, num_kv_heads: int, *,
          prefix: str, **named: Any) -> MixedAttention:  # fmt: skip
    """What a block constructs in the place of `Attention(num_heads, ...)` where some heads keep every token."""
    part_metadata()
    here = full_heads_of_ranks(full_heads, kv_heads_in_all(), tensor_parallel_size())[tensor_parallel_rank()]
    group, named = num_heads // num_kv_heads, named | {"per_layer_sliding_window": None}
    full = Attention(len(here) * group, head_size, scale, num_kv_heads=len(here), prefix=f"{prefix}.full", **named)
    rest = num_kv_heads - len(here)
    limited = LimitedAttention(
        rest * group, head_size, scale, num_kv_heads=rest, prefix=f"{prefix}.limited", size=size, **named
    )
    return MixedAttention(full, limited, here)


def load_heads(heads: Sequence[int], parameter: Tensor, loaded: Tensor) -> None:
    """Fill a parameter [heads, d] with those heads of this rank from a tensor of all heads [K, d]; ranks may share."""
    first = tensor_parallel_rank() * loaded.shape[0] // tensor_parallel_size()
    parameter.data.copy_(loaded[[first + head for head in heads]])


class Window:
    """The kind `window`: `{"size": W, "sink": true|false, "full_heads": [h, ...]}`."""

    def attention_class(self, spec: Mapping[str, Any]) -> Callable[..., nn.Module]:
        """What a block constructs in the place of vLLM's `Attention`."""
        if full_heads := spec.get("full_heads"):
            return partial(mixed, int(spec["size"]), full_heads)
        return partial(LimitedAttention, size=int(spec["size"]))

    def prepare(self, module: nn.Module, spec: Mapping[str, Any]) -> None:
        """Give an attention module its sinks, under the names they have in the checkpoint."""
        if not spec["sink"]:
            return
        attention: Any = module.attn
        limited, heads = attention, tuple(range(attention.num_kv_heads))
        if isinstance(attention, MixedAttention):
            limited, heads = attention.limited, attention.others
        for name in SINKS:
            sink = nn.Parameter(torch.zeros(len(heads), attention.head_size), requires_grad=False)
            sink.weight_loader = partial(load_heads, heads)
            module.register_parameter(name, sink)
        limited.planter = Planter(int(spec["size"]), module)
        module.register_forward_pre_hook(limited.planter, with_kwargs=True)


VARIANT = Window()
