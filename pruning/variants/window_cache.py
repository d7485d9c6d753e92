"""The cache of limited layers in transformers: the window for limited KV heads, every token for the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROLLBACK_TOKENS = 256  # of the last forward that can be taken back, as guesses are


class WindowLayer(DynamicSlidingWindowLayer):
    """The last tokens, and until the next forward those before them that a `crop` may bring back.

    `generate` tells the layers that it will crop before limited layers are known, so this one always can.

    Args:
        size: Positions that a token sees, its own among them.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [b, K, T, d]; those that attention sees, [b, K, S, d]."""
        if self.is_initialized:
            self._keep(self.sliding_window - 1)
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        self._keep(self.sliding_window - 1 + min(key_states.shape[2], ROLLBACK_TOKENS))
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, a negative number."""
        if tokens_to_remove < -ROLLBACK_TOKENS:
            raise RuntimeError(f"a window takes back at most {ROLLBACK_TOKENS} tokens, not {-tokens_to_remove}")
        super().crop(tokens_to_remove)

    def _keep(self, tokens: int) -> None:
        first = max(0, self.keys.shape[2] - tokens)
        self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]


class HeadsLayer(CacheLayerMixin):
    """A layer of a `DynamicCache` whose KV heads look back differently far; one piece for all heads of one window.

    Args:
        windows: Of each KV head, the positions that it sees, its own among them; None: all.
    """

    supports_early_init = False
    is_croppable = True

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.pieces: list[tuple[list[int], DynamicLayer]] = [
            ([head for head, each in enumerate(windows) if each == window],
             DynamicLayer() if window is None else WindowLayer(window))
            for window in sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
        ]  # fmt: skip
        super().__init__()

    @property
    def widest(self) -> DynamicLayer:
        """The piece that holds the most tokens."""
        return self.pieces[0][1]

    @property
    def is_sliding(self) -> bool:
        """Whether no head keeps every token."""
        return bool(self.widest.is_sliding)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: each piece does it by itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [b, K, T, d]; those that attention sees, [b, K, S, d].

        S is that of the widest piece. In its place a token that a head keeps no more is zero: no query of that head
        sees it, and it lives only while the layer is computed.
        """
        self.is_initialized = True
        found = [(heads, layer.update(key_states[:, heads], value_states[:, heads])) for heads, layer in self.pieces]
        seen = found[0][1][0].shape[2]

        def joined(which: int, states: Tensor) -> Tensor:
            whole = found[0][1][which].new_zeros(*states.shape[:2], seen, states.shape[3])
            for heads, kept in found:
                whole[:, heads, seen - kept[which].shape[2] :] = kept[which]
            return whole

        return joined(0, key_states), joined(1, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return."""
        sizes: tuple[int, int] = self.widest.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return int(self.widest.get_seq_length())

    def get_max_length(self) -> int:
        """Of the widest piece; -1: no maximum."""
        return int(self.widest.get_max_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, a negative number."""
        for _, layer in self.pieces:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        for _, layer in self.pieces:
            layer.reset()

    def offload(self) -> None:
        """To the CPU."""
        for _, layer in self.pieces:
            layer.offload()

    def prefetch(self) -> None:
        """Back to the device."""
        for _, layer in self.pieces:
            layer.prefetch()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        for _, layer in self.pieces:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        for _, layer in self.pieces:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        for _, layer in self.pieces:
            layer.batch_select_indices(indices)


def keep_windows(cache: DynamicCache, layer: int, windows: Sequence[int | None]) -> None:
    """Let one layer of a cache that is still empty hold no more than what its KV heads see.

    Args:
        cache: Of a model in transformers.
        layer: Its index.
        windows: As `HeadsLayer` takes them.
    """
    if layer < len(cache.layers):
        held = cache.layers[layer]
        if type(held) is not DynamicLayer or held.is_initialized:
            return
    cache.layers += [DynamicLayer() for _ in range(layer + 1 - len(cache.layers))]
    (first, *others) = set(windows)
    cache.layers[layer] = HeadsLayer(windows) if others or first is None else WindowLayer(first)
