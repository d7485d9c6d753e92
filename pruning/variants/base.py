"""What every kind of variant has to answer, and what its modules have in common."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from pruning.families import Family
from pruning.plan import Sublayer
from pruning.variants.taps import Tap

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator
    from pruning.forward.walk import Seen

Module = TypeVar("Module", bound=nn.Module)


class Emulation(nn.Module):
    """The module of a variant, in the place of one sublayer.

    Attributes:
        sources: Blocks whose attention it reads, all before its own.
        taps: What those put out in the forward under way.
        in_place: Whether it works inside the sublayer that was there, instead of replacing it.
    """

    in_place: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.sources: tuple[int, ...] = ()
        self.taps: list[Tap] = []

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        raise NotImplementedError

    def entry(self) -> dict[str, Any]:
        """The checkpoint's entry of the whole sublayer."""
        return {"no_op": not self.in_place, "emulation": self.describe()}

    def update(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What takes the place of the sublayer's update, for the residual stream [..., D]."""
        found: Tensor = self(hidden)
        return found

    def inside(self, sublayer: nn.Module) -> nn.Module:
        """A sublayer like the given one that works with this module (in-place variants)."""
        raise NotImplementedError

    def renumber(self, indices: Sequence[int]) -> None:
        """Follow the removal of whole blocks: `indices` are the old numbers of those that stay."""
        self.sources = tuple(indices.index(source) for source in self.sources)

    def borrow(self, blocks: Sequence[nn.Module], attribute: str) -> None:
        """Let it use, from now on, what it borrows from the same sublayer of another of these blocks."""

    @contextmanager
    def borrowing(self, blocks: Sequence[nn.Module], attribute: str) -> Iterator[None]:
        """The same inside the `with`."""
        yield


@dataclass(frozen=True, slots=True)
class Job:
    """One sublayer to fit a variant for.

    Attributes:
        evaluator: Of the dense model.
        sublayer: Which.
        inputs: The pruned stream before it, batches of [b, T, D].
        targets: The dense stream after it, the same.
        rank: r of low-rank maps.
        window: Positions that a limited layer keeps.
        taps: What attention layers before it put out in the pruned model, for each batch.
        sources: Blocks among them that it reads.
        seen: What the sublayer reads in the dense model, where the variant asks for it.
        noted: What attention layers put out in the dense model, for each batch.
        prepared: What `Variant.prepare` gave for this sublayer.
    """

    evaluator: "Evaluator"
    sublayer: Sublayer
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    rank: int
    taps: "Sequence[Taps]"
    window: int = 0
    sources: tuple[int, ...] = ()
    seen: "Seen | None" = None
    noted: "Sequence[Taps]" = ()
    prepared: Any = None


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that a variant's bytes follow from.

    Attributes:
        hidden_size: D.
        heads: H.
        kv_heads: K.
        head_dim: d.
        dtype_bytes: Of one weight.
        rank: r.
        sources: k, attention layers that are read.
        whole: Weight bytes of the sublayer itself.
        maps: (in, out, bias) of its linear maps.
        output: Which of them is the output projection.
        units: That an FFN keeps; None: nothing says so.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    rank: int
    sources: int
    whole: int = 0
    maps: Sequence[tuple[int, int, bool]] = ()
    output: int | None = None
    units: int | None = None

    def of_units(self, units: int | None) -> "Shape":
        """The same of an FFN that keeps so many units."""
        return replace(self, units=units)


class Variant:
    """A kind: how it is fitted, built, described and counted.

    Attributes:
        title: What it is, for messages.
        way_out: What to do where a format cannot hold it, for messages.
        in_place: Whether its module works inside the sublayer that was there.
        reads: Attributes of a source's tap that it reads.
        sees_dense: Whether its fit asks for what the sublayer reads in the dense model (`Job.seen`).
        rank_when_fused: Rank of the FFN units that can carry it, given (r, D): 0 a constant; None: none can.
        trains_norms: Whether healing trains the norms of the sublayer, which stay.
        changes_weights: Whether weights of the dense model go or change; if not, a plan file can hold it.
        walks: Whether its fit depends on what else is gone; if not, `prepare` gives the module itself.
        final: Whether nothing more can be taken out of a checkpoint that holds it.
    """

    title: ClassVar[str] = "the adapter"
    way_out: ClassVar[str] = "stands in the way; prune again with --fuse, which removes it"
    in_place: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset({"output"})
    sees_dense: ClassVar[bool] = False
    trains_norms: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = True
    walks: ClassVar[bool] = True
    final: ClassVar[bool] = False

    def check(self, family: Family, config: Any) -> None:
        """Refuse a family that cannot have it.

        Raises:
            RecipeError: Why.
        """

    def sources(
        self, gone: Collection[Sublayer], sublayer: Sublayer, layer_types: Sequence[str] | None, count: int
    ) -> tuple[int, ...]:
        """Blocks whose attention it reads, with `gone` removed or limited."""
        return ()

    def prepare(
        self, evaluator: "Evaluator", wanted: Sequence[Sublayer], gone: Collection[Sublayer], rank: int, size: int,
        reporter: "Reporter", enter: Callable[..., Any],
    ) -> Mapping[Sublayer, Any]:  # fmt: skip
        """What can be found before the walk over the blocks, for `Job.prepared`.

        Args:
            evaluator: Of the dense model, on the calibration tokens.
            wanted: The sublayers that become this variant.
            gone: All that become any variant.
            rank: r.
            size: Positions that a limited layer keeps.
            reporter: For progress.
            enter: `forward.walk.enter`: streams before block 0 and the blocks' arguments.
        """
        return {}

    def fit(self, job: Job) -> Emulation | None:
        """The module for one sublayer."""
        raise NotImplementedError

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> Emulation:
        """The untrained module that a checkpoint's entry names.

        Args:
            entry: Of one sublayer.
            own: The sublayer's dense module.
            config: Of the model.
            output: Attribute of `own` that holds the output projection.
        """
        raise NotImplementedError

    def positions(self, entry: Mapping[str, Any]) -> int | None:
        """Positions that a layer with this entry keeps in its cache; None: all, or it has none."""
        return None

    def weight_bytes(self, shape: Shape) -> int:
        """Weight bytes of what is there instead of the sublayer; an upper bound."""
        raise NotImplementedError

    def rank_when_fused(self, rank: int, hidden_size: int) -> int | None:
        """Rank of the FFN units that can carry it: 0 a constant; None: none can."""
        return None


def shallow_copy(module: Module) -> Module:
    """A module with the same parameters, submodules and hooks, whose attributes can be changed without the other's."""
    made = copy.copy(module)
    for key, value in vars(made).items():
        vars(made)[key] = copy.copy(value) if isinstance(value, dict) else value
    return made
