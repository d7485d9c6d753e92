"""Evaluate any subnetwork of a model without copying or editing it, reusing what subnetworks share."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.modeling import blocks_of, places, replace_sublayer
from pruning.plan import Kind, Sublayer

HEAD_CHUNK_TOKENS = 512


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


class Evaluator:
    """Runs subnetworks of one model over calibration windows.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        tokens: int64 [n, T].
        batch_size: Windows in one forward.
    """

    def __init__(self, model: PreTrainedModel, family: Family, tokens: Tensor, batch_size: int = 4) -> None:
        self.model, self.family = model, family
        self.blocks = list(blocks_of(model, family))
        self.batches = list(tokens.split(batch_size))

    @torch.inference_mode()
    def embed(self, batch: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
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
            out = block(hidden, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def head_loss(self, hidden: Tensor, batch: Tensor) -> Tensor:
        """Next-token cross-entropy of every window, float64 [b] in nats/token; logits come in chunks."""
        hidden = self.model.get_submodule(self.family.norm)(hidden)[:, :-1]
        targets = batch[:, 1:].to(hidden.device)
        head = self.model.get_submodule(self.family.head)
        flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        losses = [
            functional.cross_entropy(head(part).float(), target, reduction="none")
            for part, target in zip(flat.split(HEAD_CHUNK_TOKENS), flat_targets.split(HEAD_CHUNK_TOKENS), strict=True)
        ]
        return torch.cat(losses).view(targets.shape).double().mean(1).cpu()

    @torch.inference_mode()
    def loss(self, gone: Mapping[Sublayer, nn.Module | None]) -> Tensor:
        """Loss of one subnetwork, float64 [n] (nats/token, one value a window)."""
        out = []
        for batch in self.batches:
            hidden, kwargs = self.embed(batch)
            out.append(self.head_loss(self._from(0, hidden, kwargs, gone), batch))
        return torch.cat(out)

    def _from(self, first: int, hidden: Tensor, kwargs: list[dict[str, Any]], gone: Mapping[Sublayer, Any]) -> Tensor:
        for index in range(first, len(self.blocks)):
            here = {s.kind: emulation for s, emulation in gone.items() if s.block == index}
            hidden = self.run_block(index, hidden, kwargs[index], here)
        return hidden

    @torch.inference_mode()
    def leave_one_out(
        self, candidates: Iterable[Sublayer], base: Collection[Sublayer] = (), advance: Any = None
    ) -> tuple[Tensor, dict[Sublayer, Tensor]]:
        """Loss of `base` removed, and of `base` and one candidate removed, for every candidate.

        The prefix up to the candidate is computed once a batch, so all candidates of L blocks cost about half of
        L full forwards.

        Returns:
            Base loss float64 [n] and candidate -> loss float64 [n], nats/token.
        """
        candidates = sorted(candidates)
        gone: dict[Sublayer, Any] = dict.fromkeys(base)
        base_losses: list[Tensor] = []
        losses: dict[Sublayer, list[Tensor]] = {candidate: [] for candidate in candidates}
        for batch in self.batches:
            prefix, kwargs = self.embed(batch)
            for index in range(len(self.blocks)):
                for candidate in (c for c in candidates if c.block == index):
                    final = self._from(index, prefix, kwargs, {**gone, candidate: None})
                    losses[candidate].append(self.head_loss(final, batch))
                    if advance is not None:
                        advance()
                here = {s.kind: None for s in gone if s.block == index}
                prefix = self.run_block(index, prefix, kwargs[index], here)
            base_losses.append(self.head_loss(prefix, batch))
        return torch.cat(base_losses), {c: torch.cat(parts) for c, parts in losses.items()}
