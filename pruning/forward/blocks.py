"""One block, one sublayer: run with a part of it removed, or with what emulates that, in a residual stream."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.models.modeling import blocks_of, emulation_in, fed, lent, places, replace_sublayer, sources_of, tap_into
from pruning.plan import KINDS, Kind, Sublayer
from pruning.variants.base import Emulation
from pruning.variants.taps import Tap

Gone = Mapping[Sublayer, nn.Module | None]
"""Removed sublayers and what emulates each (None: nothing)."""

Arguments = list[dict[str, Any]]
"""Keyword arguments that the model gives to each block."""

Taps = dict[int, Tap]
"""Block -> what its attention put out in one stream."""


class _Capture(nn.Module):
    """Takes a block's place to record what the model passes to it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self.inputs: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.inputs, self.kwargs = hidden_states, kwargs
        return hidden_states


@contextmanager
def removed(block: nn.Module, family: Family, kind: Kind, emulation: nn.Module | None = None) -> Iterator[None]:
    """Let a block run without one sublayer (or with its emulation) inside the `with`; restored after it."""
    names = places(family, kind)
    saved = [getattr(block, name) for name in names]
    replace_sublayer(block, family, kind, emulation)
    try:
        yield
    finally:
        for name, module in zip(names, saved, strict=True):
            setattr(block, name, module)


class _Held(Emulation):
    """An update that is known already, [b, T, D]."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = held

    def forward(self, hidden: Tensor) -> Tensor:
        return self.held


class Blocks:
    """The blocks of a model, to run one at a time.

    Args:
        model: Left as it is.
        family: Where its parts are.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self.blocks = list(blocks_of(model, family))

    @torch.no_grad()
    def embed(self, batch: Tensor) -> tuple[Tensor, Arguments]:
        """What enters block 0, float [b, T, D], and the keyword arguments the model gives to every block."""
        captures = nn.ModuleList([_Capture(block) for block in self.blocks])
        parent, _, name = self.family.blocks.rpartition(".")
        owner = self.model.get_submodule(parent)
        saved = getattr(owner, name)
        setattr(owner, name, captures)
        try:
            owner(input_ids=batch.to(self.model.device), use_cache=False)
        finally:
            setattr(owner, name, saved)
        hidden = captures[0].inputs
        assert isinstance(hidden, Tensor)
        return hidden, [capture.kwargs for capture in captures]

    def run_block(self, index: int, hidden: Tensor, kwargs: Mapping[str, Any], gone: Mapping[Kind, Any]) -> Tensor:
        """One block [b, T, D] -> [b, T, D] without the kinds in `gone` (values: their emulation or None)."""
        block = self.blocks[index]
        with ExitStack() as stack:
            for kind, emulation in gone.items():
                stack.enter_context(removed(block, self.family, kind, emulation))
                stack.enter_context(lent(emulation, self.blocks, self.family, kind))
            out = block(hidden, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run_sublayer(
        self,
        sublayer: Sublayer,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        emulation: nn.Module | None = None,
        entered: Tensor | None = None,
    ) -> Tensor:
        """The residual stream [b, T, D] after one sublayer, or after its emulation.

        Args:
            sublayer: Which.
            hidden: The stream before it.
            kwargs: What the model gives to its block.
            emulation: Takes the sublayer's place.
            entered: What an FFN reads instead, where it stands in parallel to attention: the stream before the block.
        """
        other: Kind = "ffn" if sublayer.kind == "attention" else "attention"
        gone: dict[Kind, Any] = {other: None}
        if emulation is not None:
            gone[sublayer.kind] = emulation
        if entered is not None:
            gone[other] = _Held(hidden - entered)  # what attention added
            hidden = entered
        return self.run_block(sublayer.block, hidden, kwargs, gone)

    def run_and_tap(
        self, sublayer: Sublayer, hidden: Tensor, kwargs: Mapping[str, Any], emulation: nn.Module | None, taps: Taps
    ) -> Tensor:
        """`run_sublayer`, where emulations read `taps` and attention adds to them what it puts out."""
        entered = self.entered_of(sublayer, taps)
        inside = emulation or emulation_in(self.blocks[sublayer.block], self.family, sublayer.kind)
        tap, attention = Tap(), getattr(self.blocks[sublayer.block], self.family.attention)
        with fed(inside, taps), tap_into(attention, tap, cache=self.family.shares_cache):
            after = self.run_sublayer(sublayer, hidden, kwargs, emulation, entered)
        if sublayer.kind == "attention":
            if emulation is not None:  # it took the place of the tapped module
                tap.output = (after - hidden) / self.family.scale(self.model.config)
            elif tap.output is not None:
                tap.output = tap.output.expand_as(hidden)  # a stand-in's is a constant
            tap.entered = hidden if self.family.parallel else None
            taps[sublayer.block] = tap
        return after

    def entered_of(self, sublayer: Sublayer, taps: Taps) -> Tensor | None:
        """What entered the block, where that is not what comes before the sublayer; attention that ran noted it."""
        attention = taps.get(sublayer.block) if sublayer.kind == "ffn" else None
        return None if attention is None else attention.entered

    def reads(self, sublayer: Sublayer, hidden: Tensor, taps: Taps) -> Tensor:
        """What an emulation reads in a sublayer's place [b, T, D]: the stream before it.

        In parallel families it is the stream that entered the block, after the norm which both sublayers share.
        """
        if not self.family.parallel:
            return hidden
        assert self.family.attention_norm is not None
        entered = self.entered_of(sublayer, taps)
        norm = self.blocks[sublayer.block].get_submodule(self.family.attention_norm)
        normed: Tensor = norm(hidden if entered is None else entered)
        return normed

    def sources(self, plans: Sequence[Gone]) -> frozenset[int]:
        """Blocks whose attention some emulation of the plans, or of the model itself, reads."""
        own = [emulation_in(block, self.family, kind) for block in self.blocks for kind in KINDS]
        given = [emulation for plan in plans for emulation in plan.values()]
        return frozenset(source for emulation in (*own, *given) for source in sources_of(emulation))
