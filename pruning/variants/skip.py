"""`skip`: an FFN that runs for some tokens only. A linear predictor decides for each token; no weight changes.

What decides is the token's own normed stream and its position, so a token gets the same answer while a prompt is read,
while text is written, and when its cache is computed again.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import RecipeError
from pruning.families import Family
from pruning.plan import FIRST_TOKENS, Sublayer
from pruning.variants.base import Emulation, Job, Shape, Variant, shallow_copy


class Skip(Emulation):
    """When an FFN runs: where w·x >= threshold for what it reads, x, and at the first positions.

    A token that skips it gets U V x + b in its place.

    Args:
        hidden_size: D.
        threshold: Scores w·x under it skip the FFN.
        rank: r of that map.
        first: Positions that skip nothing.

    Attributes:
        skip_weight: w, [D].
        skip_update: b, [D].
        skip_down: V, [r, D].
        skip_up: U, [D, r].
        positions: Of the tokens in the block's forward under way, [b or 1, T]; None: each row starts a text.
        seen: Tokens that came so far.
        skipped: Those of them that skipped the FFN.

    Source: FFN-SkipLLM, arXiv 2404.03865: FFNs that change the stream little, but for the first and last blocks and
        the first tokens. Inferred: a predictor in place of the FFN's own output, the map, and every token, where the
        paper skips only while text is written.
    """

    in_place = True

    def __init__(self, hidden_size: int, threshold: float, rank: int, first: int = FIRST_TOKENS) -> None:
        super().__init__()
        self.threshold, self.rank, self.first = threshold, rank, first
        self.skip_weight = nn.Parameter(torch.zeros(hidden_size))
        self.skip_update = nn.Parameter(torch.zeros(hidden_size))
        self.skip_down = nn.Parameter(torch.zeros(rank, hidden_size))
        self.skip_up = nn.Parameter(torch.zeros(hidden_size, rank))
        self.positions: Tensor | None = None
        self.seen = self.skipped = 0

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `skip` entry."""
        return {"threshold": self.threshold, "rank": self.rank, "first": self.first}

    def entry(self) -> dict[str, Any]:
        """The checkpoint's entry of the sublayer."""
        return {"no_op": False, "emulation": None, "skip": self.describe()}

    def inside(self, sublayer: nn.Module) -> nn.Module:
        """The FFN, which asks this module for each token; all weights are the given module's."""
        made: Any = shallow_copy(sublayer)
        own: Any = type(sublayer)
        made.__class__ = _skipping(own)
        for name, parameter in self.named_parameters():
            made.register_parameter(name, parameter)
        vars(made)["emulation"] = self  # an attribute, no submodule: each tensor has one name in a checkpoint
        return made

    def borrow(self, blocks: Sequence[nn.Module], attribute: str) -> None:
        """Be told the positions of each forward of its block from now on."""
        self._block(blocks, attribute).register_forward_pre_hook(self.note, with_kwargs=True)

    @contextmanager
    def borrowing(self, blocks: Sequence[nn.Module], attribute: str) -> Iterator[None]:
        """The same inside the `with`."""
        handle = self._block(blocks, attribute).register_forward_pre_hook(self.note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _block(self, blocks: Sequence[nn.Module], attribute: str) -> nn.Module:
        return next(block for block in blocks if getattr(getattr(block, attribute), "emulation", None) is self)

    def note(self, module: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> None:
        """Note the positions; the signature is that of a forward pre-hook with keywords."""
        self.positions = kwargs.get("position_ids")

    def runs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Which tokens the FFN runs for, bool [b, T], by what it reads, [b, T, D]."""
        positions, self.positions = self.positions, None
        if positions is None:
            positions = torch.arange(hidden.shape[-2], device=hidden.device)
        # A score that is no number is no reason to skip.
        return ~(scores(hidden, weight) < self.threshold) | (positions < self.first)

    def run(self, ffn: Callable[[Tensor], Tensor], module: Any, hidden: Tensor) -> Tensor:
        """What the FFN puts out, [b, T, D]: computed for the tokens that need it, gathered.

        Args:
            ffn: Its own forward.
            module: The FFN, which holds `skip_weight` and the others.
            hidden: What it reads, [b, T, D].
        """
        runs = self.runs(hidden, module.skip_weight)
        some = hidden[runs]
        self.seen, self.skipped = self.seen + runs.numel(), self.skipped + runs.numel() - len(some)
        if len(some) == runs.numel():
            return ffn(hidden)
        if not len(some):
            return instead(module, hidden)
        found = ffn(some)
        made = torch.empty(hidden.shape, dtype=found.dtype, device=found.device)
        made[runs] = found
        made[~runs] = instead(module, hidden[~runs]).to(found.dtype)
        return made


def instead(module: Any, hidden: Tensor) -> Tensor:
    """What tokens get that skip an FFN, U V x + b for x [..., D] -> [..., D]."""
    update: Tensor = hidden @ module.skip_down.T @ module.skip_up.T + module.skip_update
    return update


def scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """w·x in float32 for x [..., D] -> [...]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.float() @ weight.float()


@contextmanager
def counting(emulations: Mapping[Sublayer, Emulation | None], num_blocks: int) -> Iterator[dict[str, Any]]:
    """How often FFNs are skipped inside the `with`, known after it: the share of all runs, and that in each block.

    Nothing is found out where no FFN may be skipped.
    """
    found = {sublayer.block: each for sublayer, each in sorted(emulations.items()) if isinstance(each, Skip)}
    for each in found.values():
        each.seen = each.skipped = 0
    rates: dict[str, Any] = {}
    yield rates
    if found:
        blocks = {str(block): each.skipped / max(1, each.seen) for block, each in found.items()}
        rates |= {"share": sum(blocks.values()) / num_blocks, "blocks": blocks}


class _Skipping(nn.Module):
    """An FFN that runs for some tokens; mixed into its own class."""

    emulation: Skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Update [b, T, D] of what the FFN reads, [b, T, D]."""
        return self.emulation.run(super().forward, self, hidden_states)


@functools.lru_cache
def _skipping(ffn: type[nn.Module]) -> type[nn.Module]:
    """The class of an FFN of this class that runs for some tokens."""
    return type(f"Skipping{ffn.__name__}", (_Skipping, ffn), {"__module__": __name__})


class SkipVariant(Variant):
    """The kind."""

    title = "the skipped FFN"
    way_out = "cannot be held; use --format shoal or plan"
    in_place = True
    final = True
    changes_weights = False

    def check(self, family: Family, config: Any) -> None:
        """Refuse mixtures of experts, and families that normalise what an FFN puts out."""
        if family.ffn_output is None:
            raise RecipeError(f"--ffn-skip is for dense FFNs, and {family.name} has experts; leave it out")
        if family.ffn_post_norm is not None:
            raise RecipeError(
                f"--ffn-skip: {family.name} has a norm after each FFN, which makes a constant as large as any update; "
                "leave it out"
            )

    def fit(self, job: Job) -> Skip:
        """The threshold and the constant, on the stream as pruned so far."""
        from pruning.variants.skip_fit import fitted

        return fitted(job)

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> Skip:
        """The module with its tensors still to load."""
        spec = entry["skip"]
        return Skip(int(config.hidden_size), float(spec["threshold"]), int(spec["rank"]), int(spec["first"]))

    def weight_bytes(self, shape: Shape) -> int:
        """All of the sublayer, two vectors, and two matrices."""
        return shape.whole + 2 * (1 + shape.rank) * shape.hidden_size * shape.dtype_bytes


SKIP = SkipVariant()
