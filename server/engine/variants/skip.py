"""An FFN that runs for some tokens only, in vLLM: the tokens of a step that need it are gathered.

Each step has another number of them, so nothing of fixed shapes can hold it: neither CUDA graphs nor torch.compile.
What decides is replicated over tensor-parallel ranks, as is what it reads, so that all ranks gather the same tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Skipper:
    """In the place of an FFN's `forward`; and a forward pre-hook on its block's attention, which tells the positions.

    Args:
        module: The FFN, which holds `skip_weight` and `skip_update` [D], `skip_down` [r, D] and `skip_up` [D, r].
        threshold: Scores under it skip the FFN.
        first: Positions that skip nothing.
        share: Of that map that this rank adds, where the block sums over ranks.
    """

    def __init__(self, module: nn.Module, threshold: float, first: int, share: float) -> None:
        self.module, self.threshold, self.first, self.share = module, threshold, first, share
        self.whole = module.forward
        self.positions: Tensor | None = None

    def note(self, module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        """Note the positions [tokens] of the step; the signature is that of a forward pre-hook."""
        self.positions = named["positions"]

    def __call__(self, hidden: Tensor) -> Tensor:
        """What the FFN puts out, [tokens, D], of what it reads, [tokens, D]."""
        assert self.positions is not None
        positions, self.positions = self.positions, None
        weight: Any = self.module.skip_weight
        # A score that is no number is no reason to skip.
        runs = ~((hidden.float() @ weight.float()) < self.threshold) | (positions < self.first)
        index = runs.nonzero().flatten()
        if len(index) == len(hidden):
            return self._run(hidden)
        if not len(index):
            return self._instead(hidden)
        others = (~runs).nonzero().flatten()
        update = torch.empty_like(hidden)
        update.index_copy_(0, index, self._run(hidden[index]))
        return update.index_copy_(0, others, self._instead(hidden[others]))

    def _run(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.whole(hidden)
        return found

    def _instead(self, hidden: Tensor) -> Tensor:
        """U V x + b, [tokens, D]."""
        module: Any = self.module
        found: Tensor = torch.addmm(module.skip_update, hidden @ module.skip_down.T, module.skip_up.T)
        return found if self.share == 1 else found * self.share


class Skip:
    """The kind `skip`: `{"threshold": t, "rank": r, "first": n}`."""

    eager = True

    def prepare(
        self, ffn: nn.Module, attention: nn.Module, spec: Mapping[str, Any], hidden_size: int, share: float
    ) -> None:
        """Give an FFN its tensors, under the names they have in the checkpoint, and let it ask for each token."""
        rank = int(spec["rank"])
        shapes = {
            "skip_weight": (hidden_size,), "skip_update": (hidden_size,), "skip_down": (rank, hidden_size),
            "skip_up": (hidden_size, rank),
        }  # fmt: skip
        for name, shape in shapes.items():
            ffn.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        skipper = Skipper(ffn, float(spec["threshold"]), int(spec["first"]), share)
        vars(ffn)["forward"] = skipper
        attention.register_forward_pre_hook(skipper.note, with_kwargs=True)


VARIANT = Skip()
