"""`window`: attention that looks back a little. It works inside the sublayer that was there and changes no weight."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning.errors import RecipeError
from pruning.families import Family, head_dim, own_window
from pruning.plan import Sublayer
from pruning.variants.base import Emulation, Job, Shape, Variant, shallow_copy
from pruning.variants.window_cache import keep_windows

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.evaluator import Evaluator

KERNEL = "shoal_window"
ENGINE_KERNELS = ("vllm",)  # limited by the engine itself


class Window(Emulation):
    """The limit of one attention layer: its last `size` positions, one of them a planted sink.

    At every position p > 0 with p mod `size` = 0 the layer's key (after its rotation) and value are replaced by two
    constants, those of a first token. Any `size` positions in a row then hold exactly one sink, on which heads rest
    when they have nothing to do; the first `size` positions have the text's own first token. The price is one token in
    `size`. A text no longer than `size` is read as by the dense model.

    Args:
        size: Positions that a token sees, its own among them.
        kv_heads: K.
        head_dim: d.
        sink: Whether a sink is planted.
        full: KV heads that are not limited and keep every token; their rows of the sinks are not used.

    Attributes:
        kv_heads: K.
        sizes: Windows that gates mix.
        gates: Per KV head, [b, K, 1 + sizes]: weights of full attention and of each window; None: as limited.
        sink_key: [K, d], or absent.
        sink_value: [K, d], or absent.

    Source: windows and sinks, StreamingLLM, arXiv 2309.17453. Inferred: planting the sink.
    """

    in_place = True

    def __init__(self, size: int, kv_heads: int, head_dim: int, sink: bool, full: Sequence[int] = ()) -> None:
        super().__init__()
        self.size, self.kv_heads, self.sink, self.full = size, kv_heads, sink, tuple(full)
        self.sizes: tuple[int, ...] = (size,)
        self.gates: Tensor | None = None
        if sink:
            self.sink_key = nn.Parameter(torch.zeros(kv_heads, head_dim))
            self.sink_value = nn.Parameter(torch.zeros(kv_heads, head_dim))

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `window` entry."""
        whole = {"full_heads": list(self.full)} if self.full else {}
        return {"size": self.size, "sink": self.sink, **whole}

    def with_heads(self, full: Sequence[int]) -> "Window":
        """The same limit but for these KV heads; the sinks are shared."""
        made: Window = shallow_copy(self)
        made.full = tuple(full)
        return made

    def among(self, sizes: Sequence[int]) -> "Window":
        """The same limit whose gates mix full attention and windows of these sizes."""
        made: Window = shallow_copy(self)
        made.sizes = tuple(sizes)
        return made

    def gated(self, gates: Tensor) -> "Window":
        """A mixture of full attention and of each of `sizes`, for each KV head; gates [b, K (1 + sizes)]."""
        made: Window = shallow_copy(self)
        made.gates = gates.view(len(gates), self.kv_heads, 1 + len(self.sizes))
        return made

    def entry(self) -> dict[str, Any]:
        """The checkpoint's entry of the sublayer."""
        return {"no_op": False, "emulation": None, "window": self.describe()}

    def inside(self, sublayer: nn.Module) -> nn.Module:
        """The attention module with this limit; all weights are the given module's."""
        made: Any = shallow_copy(sublayer)
        for name, parameter in self.named_parameters():
            made.register_parameter(name, parameter)
        vars(made)["emulation"] = self  # an attribute, no submodule: the sinks have one name in a checkpoint
        made.register_forward_pre_hook(self.limit, with_kwargs=True)
        if made.config._attn_implementation not in ENGINE_KERNELS:
            made.config = with_our_kernel(made.config)
        return made

    def limit(self, module: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Plant the sink in what the module caches; the signature is that of a forward pre-hook with keywords."""
        if self.gates is not None:
            return arguments, kwargs  # the kernel wants both what was there and what is planted
        planted = _Planted(kwargs.get("past_key_values"), module, self.size, kwargs.get("position_ids"))
        return arguments, kwargs | {"past_key_values": planted}


def with_our_kernel(config: Any) -> Any:
    """The configuration with our kernel; the copy shares everything else."""
    made = copy.copy(config)
    vars(made)["_attn_implementation_internal"] = KERNEL
    return made


class _Planted:
    """Stands before the KV cache of one layer, or for one that is not there, and plants the sink in what enters it."""

    def __init__(self, cache: Any, module: nn.Module, size: int, positions: Tensor | None) -> None:
        self._cache, self._module, self._size, self._positions = cache, module, size, positions

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [b, K, T, d] of the new tokens -> those the layer attends to, [b, K, S, d]."""
        sink = getattr(self._module, "sink_key", None)
        if sink is not None:
            positions = self._positions
            if positions is None:
                seen = 0 if self._cache is None else self._cache.get_seq_length()
                positions = torch.arange(seen, seen + keys.shape[2], device=keys.device)[None]
            here = planted_at(positions, self._size)[:, None, :, None]
            if full := self._module.emulation.full:
                here = here & _others(keys.shape[1], full, keys.device)[:, None, None]
            keys = torch.where(here, sink[:, None].to(keys), keys)
            values = torch.where(here, self._module.sink_value[:, None].to(values), values)
        if self._cache is None:
            return keys, values
        if isinstance(self._cache, DynamicCache) and args:
            full = self._module.emulation.full
            sizes = [None if head in full else self._size for head in range(keys.shape[1])]
            keep_windows(self._cache, int(args[0]), sizes)
        found: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def planted_at(positions: Tensor, size: int) -> Tensor:
    """Which positions hold a sink of windows of `size`, bool; the text's own first token is left as it is."""
    return (positions % size == 0) & (positions > 0)


def _others(heads: int, full: Sequence[int], device: torch.device) -> Tensor:
    """Which KV heads are limited, bool [K]."""
    return torch.tensor([head not in full for head in range(heads)], device=device)


def windowed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, softcap: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of each token to the last `size` positions, in time linear in the length; of full heads to all.

    Args:
        module: The limited attention module.
        query: [b, H, T, d].
        key: [b, K, S, d].
        value: The same.
        attention_mask: As the model gives it to full layers, bool or additive, [b, 1, T, >= S], or [b, >= S] of tokens
            that are there; None: nothing is padded.
        scaling: Of the logits.
        dropout: Of the probabilities.
        softcap: c of c tanh(logit / c).

    Returns:
        [b, T, H, d], and no probabilities.
    """
    limit: Window = module.emulation
    padding = _visible(attention_mask, query.shape[2], key.shape[2])

    def attend(q: Tensor, k: Tensor, v: Tensor, size: int | None) -> Tensor:
        return _sliding(q, k, v, size, padding, scaling or query.shape[-1] ** -0.5, dropout, softcap)

    if limit.gates is not None:
        out = _gated(module, query, key, value, attend)
    elif limit.full:
        others = [head for head in range(key.shape[1]) if head not in limit.full]
        assert others
        order, parts = [], []
        for heads, size in ((limit.full, None), (others, limit.size)):
            queries = _queries(query, key, heads)
            order += queries
            parts.append(attend(query[:, queries], key[:, list(heads)], value[:, list(heads)], size))
        out = torch.cat(parts, 1)[:, torch.tensor(order, device=query.device).argsort()]
    else:
        out = attend(query, key, value, limit.size)
    return out.transpose(1, 2).contiguous(), None


def _queries(query: Tensor, key: Tensor, heads: Sequence[int]) -> list[int]:
    """The query heads that read these KV heads."""
    group = query.shape[1] // key.shape[1]
    return [head * group + member for head in heads for member in range(group)]


def _gated(module: Any, query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """Attention [b, H, T, d] between full and limited, on a text that starts here and has not been cached."""
    limit: Window = module.emulation
    assert limit.gates is not None
    gates = limit.gates.repeat_interleave(query.shape[1] // key.shape[1], 1)[..., None, None]
    out = gates[:, :, 0] * attend(query, key, value, None)
    for number, size in enumerate(limit.sizes, 1):
        planted = key, value
        if limit.sink:
            here = planted_at(torch.arange(key.shape[2], device=key.device), size)[:, None]
            constants = (module.sink_key, key), (module.sink_value, value)
            planted = tuple(torch.where(here, sink[:, None].to(own), own) for sink, own in constants)
        out = out + gates[:, :, number] * attend(query, *planted, size)
    return out


def _sliding(
    query: Tensor, key: Tensor, value: Tensor, size: int | None, padding: Tensor | None, scale: float, dropout: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Attention [b, H, T, d] of each token to the last `size` positions; None: to all before it."""
    length, seen = query.shape[2], key.shape[2]
    # Without a mask a text starts here, or one token sees all of its window; a static cache holds room behind the text.
    own = torch.arange(length, device=query.device)[None, None, :, None] + (seen - 1 if length == 1 else 0)
    if padding is not None and length != seen:
        own = (seen - 1) - padding.flip(-1).int().argmax(-1, keepdim=True)
    step = max(256, size or 1024) if length == seen else length
    pieces = []
    for start in range(0, length, step):
        end = min(length, start + step)
        first, last = (0 if size is None else max(0, start - size + 1), end) if length == seen else (0, seen)
        i, j = own[:, :, start:end], torch.arange(first, last, device=query.device)
        allowed = j <= i if size is None else (j <= i) & (i - j < size)
        if padding is not None:
            allowed = allowed & padding[:, :, start:end, first:last] | (i == j)  # a padded token sees itself
        some = query[:, :, start:end], key[:, :, first:last], value[:, :, first:last]
        pieces.append(_attention(*some, allowed, scale, dropout, softcap))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _visible(mask: Tensor | None, length: int, seen: int) -> Tensor | None:
    """Which keys each token may see by the model's own mask, bool [b, 1, T, S]; None: all before it."""
    if mask is None:
        return None
    visible = mask if mask.dtype == torch.bool else mask.bool() if mask.dim() == 2 else mask >= 0
    if visible.dim() == 2:
        visible = visible[:, None, None].expand(-1, 1, length, -1)
    return visible[..., -seen:]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, dropout: float, softcap: float | None
) -> Tensor:
    """Attention [b, H, T, d]; with logits that are capped, as Gemma 2's, where `softcap` says so."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap)) * softcap
    probabilities = logits.masked_fill(~allowed, float("-inf")).softmax(-1, dtype=torch.float32)
    return probabilities.to(value.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(KERNEL, windowed_attention)


class WindowVariant(Variant):
    """The kind."""

    title = "the window"
    way_out = "cannot be held; use --format shoal or plan"
    in_place = True
    changes_weights = False
    walks = False

    def check(self, family: Family, config: Any) -> None:
        """Refuse a model whose attention layers are all limited by design."""
        blocks = range(config.num_hidden_layers)
        if all(own_window(config, block) is not None for block in blocks):
            raise RecipeError("every attention layer of this model has a sliding window already; nothing to limit")

    def prepare(
        self, evaluator: "Evaluator", wanted: Sequence[Sublayer], gone: Collection[Sublayer], rank: int, size: int,
        reporter: "Reporter", enter: Callable[..., Any],
    ) -> Mapping[Sublayer, Any]:  # fmt: skip
        """The limit of each layer, with the sink, or none, that changes its update least."""
        from pruning.variants.window_fit import limits

        return {sublayer: limit.window for sublayer, limit in limits(evaluator, wanted, size, reporter).items()}

    def fit(self, job: Job) -> Window:
        """The prepared limit: it does not depend on what else is gone."""
        window: Window = job.prepared
        return window

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> Window:
        """The window with sinks still to load."""
        spec = entry["window"]
        full = spec.get("full_heads", ())
        return Window(int(spec["size"]), int(config.num_key_value_heads), head_dim(config), bool(spec["sink"]), full)

    def positions(self, entry: Mapping[str, Any]) -> int:
        """The window."""
        return int(entry["window"]["size"])

    def weight_bytes(self, shape: Shape) -> int:
        """All of the sublayer, and two constants."""
        return shape.whole + 2 * shape.kv_heads * shape.head_dim * shape.dtype_bytes


WINDOW = WindowVariant()
