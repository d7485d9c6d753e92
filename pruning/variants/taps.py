"""What an attention layer hands on to the variants that read it, and the normalisation they share."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RMS_EPSILON = 1e-6


def rms_normalise(hidden: Tensor) -> Tensor:
    """Scale each token to unit root mean square: x / sqrt(mean(x^2) + 1e-6), computed in float32.

    Args:
        hidden: Residual stream [..., D].

    Returns:
        Same shape and dtype.

    Source: arXiv 1910.07467, without the gain (the adapter's matrix carries it).
    """
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPSILON)).to(hidden.dtype)


class _Recorder:
    """Stands before a KV cache, or for one that is not there, and notes what an attention layer reads from it."""

    def __init__(self, cache: Any, tap: "Tap") -> None:
        self._cache, self._tap = cache, tap

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        self._tap.keys, self._tap.values = keys, values
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Tap:
    """What one attention layer hands on in the forward under way, to the emulations that name it as a source.

    Its two methods are hooks on that layer's module, and are copied with it.

    Attributes:
        output: What left the module (after its output projection, before any norm or multiplier), [..., D].
        entered: The stream that entered the block, which is what a parallel family's FFN reads; others leave it out.
        keys: What the module attended to, after its rotation and from its cache, [b, K, S, d].
        values: The same.
        module: The attention module.
    """

    def __init__(self, output: Tensor | None = None, entered: Tensor | None = None) -> None:
        self.output = output
        self.entered = entered
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.module: nn.Module | None = None

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Note the output; the signature is that of a forward hook."""
        self.output = output[0] if isinstance(output, tuple) else output

    def record(self, module: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let the module note its keys and values; the signature is that of a forward pre-hook with keywords."""
        self.module = module
        return arguments, kwargs | {"past_key_values": _Recorder(kwargs.get("past_key_values"), self)}

    def split(self, rows: int) -> "list[Tap]":
        """One tap for each stream of `rows` windows that went through the layer together."""
        assert self.output is not None
        count = len(self.output) // rows
        taps = [Tap() for _ in range(count)]
        for name in ("output", "entered", "keys", "values"):
            whole = getattr(self, name)
            for tap, part in zip(taps, [None] * count if whole is None else whole.split(rows), strict=True):
                setattr(tap, name, part)
        for tap in taps:
            tap.module = self.module
        return taps

    def rotate(self, query: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Queries [b, H, T, d] turned by their positions, as the layer turns its own."""
        code = importlib.import_module(type(self.module).__module__)
        rotated: Tensor = code.apply_rotary_pos_emb(query, query[:, :0], *position_embeddings)[0]
        return rotated

    def attend(self, query: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any) -> Tensor:
        """Attention of other queries to what this layer attended to, by its own rotation, scale and kernel.

        Args:
            query: Not rotated yet, [b, H, T, d].
            position_embeddings: Cosines and sines [b, T, d] as the model gives them to its blocks.
            attention_mask: As the model gives it.

        Returns:
            Head contexts [b, T, H d].
        """
        assert self.module is not None
        code = importlib.import_module(type(self.module).__module__)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.module.config._attn_implementation, code.eager_attention_forward
        )
        window = getattr(self.module, "sliding_window", None)
        assert self.keys is not None
        rotated = self.rotate(query.to(self.keys.dtype), position_embeddings)
        options = {"dropout": 0.0, "scaling": self.module.scaling} | ({"sliding_window": window} if window else {})
        contexts, _ = kernel(self.module, rotated, self.keys, self.values, attention_mask, **options)
        return contexts.flatten(2).to(query.dtype)


def context_features(hidden: Tensor, outputs: Sequence[Tensor | None]) -> Tensor:
    """[rms(x), c_1, ..., c_k] as one [..., D (1+k)] for a residual stream x [..., D]."""
    contexts = [torch.zeros_like(hidden) if c is None else c.expand_as(hidden).to(hidden) for c in outputs]
    return torch.cat([rms_normalise(hidden), *contexts], -1)
