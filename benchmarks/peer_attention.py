"""Attention of other methods, as functions that transformers calls: first and recent tokens only, and small numbers.

They are for measuring. A forward over a whole text sees what a server's attention would read from its cache; nothing is
saved here.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning.families import Family
from pruning.models.modeling import blocks_of

FIRST = 4  # tokens that StreamingLLM and LightTransfer keep
ASKING = 64  # last tokens of a row whose attention tells how lazy a layer is
STEP = 512  # queries at once
FP8_MAX, INT8_MAX = 448.0, 127.0
SCALE_BYTES = 4  # float32, as vLLM stores the scale of each token and head

Attend = Callable[..., tuple[Tensor, Any]]


def attention_modules(model: nn.Module, family: Family) -> list[Any]:
    """The attention module of every block, None where a block has none."""
    return [getattr(block, family.attention, None) for block in blocks_of(model, family)]


def _use(module: Any, name: str, attend: Attend) -> None:
    """Let one attention module call `attend`; it shares everything else with the others."""
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    module.config = copy.copy(module.config)
    vars(module.config)["_attn_implementation_internal"] = name


def first_and_recent(model: nn.Module, family: Family, sizes: dict[int, int]) -> None:
    """Let some blocks attend to the first tokens and the most recent ones alone, in place.

    Args:
        model: A copy that may be changed.
        family: Where its parts are.
        sizes: Block -> positions that it keeps, first and recent together.

    Source: StreamingLLM, arXiv 2309.17453. Different: positions stay those of the text, where the paper numbers what
        is in the cache, for texts longer than the model was trained on.
    """
    modules = attention_modules(model, family)
    for block, size in sizes.items():
        modules[block].shoal_recent = size - FIRST
        _use(modules[block], "shoal_first_and_recent", _first_and_recent)


def _first_and_recent(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [b, T, H, d] of a text that starts here, query [b, H, T, d], key and value [b, K, T, d]."""
    length, recent, pieces = query.shape[2], module.shoal_recent, []
    for start in range(0, length, STEP):
        end = min(length, start + STEP)
        begin = max(0, start - recent + 1)
        begin = 0 if begin <= FIRST else begin
        seen = torch.arange(begin, end)
        if begin:
            seen = torch.cat([torch.arange(FIRST), seen])
        own = torch.arange(start, end)[:, None]
        allowed = (seen <= own) & ((own - seen < recent) | (seen < FIRST))
        k, v = key[:, :, seen], value[:, :, seen]
        pieces.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end], k, v, attn_mask=allowed, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


@contextmanager
def _observed(model: nn.Module, family: Family, observe: Callable[[int, Any, Tensor, Tensor], None]) -> Iterator[None]:
    """Show block, module, queries [b, H, T, d] and keys [b, K, T, d] of every layer inside the `with`."""
    modules = attention_modules(model, family)
    before = [module.config for module in modules]
    for index, module in enumerate(modules):
        inner = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]

        def attend(
            own: Any, query: Tensor, key: Tensor, *rest: Any, _block: int = index, _inner: Attend = inner, **kwargs: Any
        ) -> tuple[Tensor, Any]:
            observe(_block, own, query, key)
            return _inner(own, query, key, *rest, **kwargs)

        _use(module, f"shoal_observed_{index}", attend)
    try:
        yield
    finally:
        for module, config in zip(modules, before, strict=True):
            module.config = config


@torch.inference_mode()
def lazy_ratios(model: nn.Module, family: Family, rows: Tensor, size: int) -> list[float]:
    """Share of attention that each layer gives to the first and the recent tokens; the largest is the laziest.

    r = mean over heads and the last `ASKING` tokens of the attention on the first `FIRST` and the last
    `size - FIRST` positions.

    Args:
        model: Dense.
        family: Where its parts are.
        rows: Text, int64 [n, T].
        size: Positions that a lazy layer keeps.

    Source: LightTransfer, arXiv 2410.13846. Different: the paper asks for every prompt while it is read, here text
        chooses once for all; the number of asking tokens is ours.
    """
    totals = [0.0] * len(attention_modules(model, family))

    def observe(block: int, module: Any, query: Tensor, key: Tensor) -> None:
        last = query[:, :, -ASKING:]
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        own = torch.arange(query.shape[2] - last.shape[2], query.shape[2])[:, None]
        seen = torch.arange(key.shape[2])
        logits = (last @ keys.transpose(-1, -2)).float() * module.scaling
        shares = logits.masked_fill(seen > own, float("-inf")).softmax(-1)
        counted = (seen < FIRST) | (own - seen < size - FIRST)
        totals[block] += float((shares * counted).sum(-1).mean())

    body: Any = model.get_submodule(family.blocks.rpartition(".")[0])
    with _observed(model, family, observe):
        for row in rows:
            body(input_ids=row[None], use_cache=False)
    return [total / len(rows) for total in totals]


def to_fp8(numbers: Tensor) -> Tensor:
    """Round to float8 e4m3 with one scale for the whole tensor, largest / 448; and back."""
    scale = numbers.abs().max().clamp_min(1e-12) / FP8_MAX
    small = (numbers / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return small.to(numbers.dtype) * scale


def to_int8(numbers: Tensor) -> Tensor:
    """Round [..., d] to int8 with a scale for each token and head, largest / 127; and back."""
    scale = numbers.abs().amax(-1, keepdim=True).clamp_min(1e-12) / INT8_MAX
    return (numbers / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"fp8": to_fp8, "int8": to_int8}


def cache_share(kind: str, head_dim: int) -> float:
    """Bytes of a small cache over those of one of 16-bit numbers."""
    return 0.5 if kind == "fp8" else (head_dim + SCALE_BYTES) / (2 * head_dim)


def quantised(model: nn.Module, family: Family, kind: str) -> None:
    """Let every layer attend to keys and values as a small cache would hold them, in place.

    Keys are rounded after their rotation, as servers cache them. Queries are not rounded, which some kernels do too.

    Args:
        model: A copy that may be changed; limits of a plan stay as they are.
        family: Where its parts are.
        kind: One of `KINDS`.

    Source: vLLM's `--kv-cache-dtype` fp8 and int8_per_token_head. Different: emulated; the scale of fp8 is that of the
        text itself, where vLLM takes 1 unless a checkpoint brings scales.
    """
    small = KINDS[kind]
    for index, module in enumerate(attention_modules(model, family)):
        if module is None:
            continue
        inner = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]

        def attend(
            own: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, _inner: Attend = inner, **kwargs: Any
        ) -> tuple[Tensor, Any]:
            return _inner(own, query, small(key), small(value), *rest, **kwargs)

        _use(module, f"shoal_{kind}_{id(model)}_{index}", attend)


def laziest(ratios: Iterable[float], count: int) -> list[int]:
    """The `count` blocks of the largest ratios."""
    each = list(ratios)
    return sorted(sorted(range(len(each)), key=lambda block: (-each[block], block))[:count])
