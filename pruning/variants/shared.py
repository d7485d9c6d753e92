"""`shared`: blocks made of another block's weights and low-rank differences. The fit is in `shared_fit.py`."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from pruning.errors import CheckpointError, RecipeError
from pruning.families import Family
from pruning.plan import Sublayer
from pruning.variants.base import Emulation, Job, Shape, Variant, shallow_copy

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.evaluator import Evaluator

SHARED = "shared"


class SharedLinear(nn.Module):
    """A linear map that borrows another's weight W: s * ((W + U D) x + b + c), D [r, in], U [out, r].

    b is the lender's bias and c this map's own difference from it, where the lender has one; s [out] is there where the
    output is normalised. The lender is no submodule, so its weight is stored, moved and counted once, where it belongs.

    Attributes:
        down: D.
        up: U, and c as its bias.
        scale: s, or None.
        lender: The module that holds the lender, and its name there; looked up in every call, for it may be replaced.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, scaled: bool) -> None:
        super().__init__()
        rank = min(rank, in_features, out_features)
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)
        self.scale = nn.Parameter(torch.ones(out_features)) if scaled else None
        self.lender: tuple[nn.Module, str] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Output [..., out] for [..., in]."""
        assert self.lender is not None
        owner, name = self.lender
        out: Tensor = getattr(owner, name)(hidden).to(hidden.device) + self.up(self.down(hidden))
        return out if self.scale is None else (out * self.scale).to(out.dtype)


class SharedEmulation(Emulation):
    """One sublayer's differences from the same sublayer of another block; its linear maps by their names.

    Args:
        source: The block that lends its weights.
        rank: r; a map that is narrower than this gets its full rank.

    Source: FlexiGPT, arXiv 2501.14713, abstract: a pruned block is replaced by the weights of one that stays, low-rank
        adapters of its own that start from an SVD, and a normalisation of its output features.
    """

    in_place = True

    def __init__(self, source: int, rank: int) -> None:
        super().__init__()
        self.source, self.rank = source, rank

    @classmethod
    def of(cls, sublayer: nn.Module, source: int, rank: int, output: str | None) -> Self:
        """Untrained differences for every linear map of a sublayer; `output` names the one whose output is scaled."""
        made = cls(source, rank)
        for name, linear in linear_maps(sublayer).items():
            sizes = linear.in_features, linear.out_features, rank
            made.add_module(name, SharedLinear(*sizes, bias=linear.bias is not None, scaled=name == output))
        return made

    def maps(self) -> dict[str, SharedLinear]:
        """The linear maps by name."""
        return {name: child for name, child in self.named_children() if isinstance(child, SharedLinear)}

    def lend(self, sublayer: nn.Module) -> None:
        """Let the maps borrow from those of a sublayer."""
        for name, shared in self.maps().items():
            shared.lender = sublayer, name

    def inside(self, sublayer: nn.Module) -> nn.Module:
        """A sublayer like the given one with these maps in place of its own; the rest of it is the same.

        The maps are attributes of it and submodules of its `emulation`, so that they have one name in a checkpoint.
        """
        made = shallow_copy(sublayer)
        for name, shared in self.maps().items():
            made._modules.pop(name, None)
            vars(made)[name] = shared
        made.emulation = self
        return made

    def describe(self) -> dict[str, Any]:
        """The checkpoint's `emulation` entry."""
        return {"kind": SHARED, "source": self.source, "rank": self.rank}

    def renumber(self, indices: Sequence[int]) -> None:
        """Follow the removal of whole blocks."""
        self.source = indices.index(self.source)

    def borrow(self, blocks: Sequence[nn.Module], attribute: str) -> None:
        """Let the maps borrow from the same sublayer of the block that lends."""
        self.lend(getattr(blocks[self.source], attribute))

    @contextmanager
    def borrowing(self, blocks: Sequence[nn.Module], attribute: str) -> Iterator[None]:
        """The same inside the `with`."""
        maps = list(self.maps().values())
        saved = [shared.lender for shared in maps]
        self.borrow(blocks, attribute)
        try:
            yield
        finally:
            for shared, lender in zip(maps, saved, strict=True):
                shared.lender = lender


class Shared(Variant):
    """The kind; it takes whole blocks."""

    title = "another block's weights in the place"
    way_out = "would be held twice; prune with --emulation none"

    in_place = True
    sees_dense = True
    trains_norms = True

    def check(self, family: Family, config: Any) -> None:
        """Refuse a family whose blocks are not made of linear maps."""
        if family.ffn_output is None:
            raise RecipeError(f"--emulation shared does not support the experts of {family.model_type}; choose none")

    def prepare(
        self, evaluator: "Evaluator", wanted: Sequence[Sublayer], gone: Collection[Sublayer], rank: int, size: int,
        reporter: "Reporter", enter: Callable[..., Any],
    ) -> Mapping[Sublayer, SharedEmulation]:  # fmt: skip
        """Who lends to whom, and the low-rank differences."""
        from pruning.variants.shared_fit import differences

        return differences(evaluator, wanted, gone, rank, reporter, enter)

    def fit(self, job: Job) -> SharedEmulation:
        """The prepared differences, with the output scaled."""
        from pruning.variants.shared_fit import normalise_output

        assert job.seen is not None
        emulation: SharedEmulation = job.prepared
        normalise_output(job.evaluator, job.sublayer, emulation, job.seen, job.noted, job.inputs, job.taps)
        return emulation

    def build(self, entry: Mapping[str, Any], own: nn.Module, config: Any, output: str | None) -> SharedEmulation:
        """The untrained differences."""
        spec = entry["emulation"]
        return SharedEmulation.of(own, int(spec["source"]), int(spec["rank"]), output)

    def weight_bytes(self, shape: Shape) -> int:
        """The sublayer without its linear maps, and the differences of those."""
        own = sum(inputs * outputs + biased * outputs for inputs, outputs, biased in shape.maps)
        less = 0
        for number, (inputs, outputs, biased) in enumerate(shape.maps):
            rank = min(shape.rank, inputs, outputs)
            less += (inputs + outputs) * rank + biased * outputs + (number == shape.output) * outputs
        return shape.whole - (own - less) * shape.dtype_bytes


def linear_maps(sublayer: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of a sublayer by name."""
    return {name: child for name, child in sublayer.named_children() if isinstance(child, nn.Linear)}


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """The ordinary weight s (W + U D) [out, in] in the dtype of W, summed in float32."""
    whole = weight.float() + up.float() @ down.float()
    return (whole if scale is None else whole * scale.float()[:, None]).to(weight.dtype)


def lenders_of(block_configs: Sequence[Mapping[str, Any]], family: Family) -> dict[str, str]:
    """Place of every sublayer that shares, such as `model.layers.5.mlp` -> place of the one that lends."""
    found: dict[str, str] = {}
    for index, block in enumerate(block_configs):
        for kind, attribute in (("attention", family.attention), ("ffn", family.ffn)):
            spec = block[kind]["emulation"]
            if spec is not None and spec["kind"] == SHARED:
                found[f"{family.blocks}.{index}.{attribute}"] = f"{family.blocks}.{spec['source']}.{attribute}"
    return found


def unshared(block_configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same blocks with ordinary sublayers in the place of those that share."""

    def plain(sublayer: Mapping[str, Any]) -> dict[str, Any]:
        spec = sublayer["emulation"]
        return {**sublayer, "emulation": None if spec is not None and spec["kind"] == SHARED else spec}

    return [{kind: plain(sublayer) for kind, sublayer in block.items()} for block in block_configs]


def materialised(
    weights: Iterable[tuple[str, Tensor]], block_configs: Sequence[Mapping[str, Any]], family: Family
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint with every shared sublayer's as ordinary weights; in any order, those come last.

    What lends is held until the end: as many blocks as lend, beside the model itself.

    Raises:
        CheckpointError: A tensor is missing, or the weights that are lent are quantised.
    """
    lenders = lenders_of(block_configs, family)
    part = re.compile(r"(.+)\.emulation\.(\w+)\.(down\.weight|up\.weight|up\.bias|scale)")
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    lent: dict[str, Tensor] = {}
    lending = tuple(f"{place}." for place in set(lenders.values()))
    for name, tensor in weights:
        found = part.fullmatch(name)
        if found and found[1] in lenders:
            parts.setdefault((found[1], found[2]), {})[found[3]] = tensor
            continue
        if lending and name.startswith(lending):
            lent[name] = tensor
        yield name, tensor
    for (place, name), own in parts.items():
        lender = f"{lenders[place]}.{name}"
        yield from _ordinary(f"{place}.{name}", lender, lent, own)
    expected, got = set(lenders), {place for place, _ in parts}
    if lacking := sorted(expected - got):
        raise CheckpointError(f"the checkpoint lacks the differences of {lacking[0]}; export it again")


def _ordinary(
    name: str, lender: str, lent: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    try:
        weight, down, up = lent[f"{lender}.weight"], own["down.weight"], own["up.weight"]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks {error.args[0]} for {name}; export it again") from None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{lender} is quantised, and {name} shares its weight; quantise another checkpoint")
    scale = own.get("scale")
    yield f"{name}.weight", merged(weight, down, up, scale)
    if (bias := lent.get(f"{lender}.bias")) is not None:
        whole = bias.float() + own["up.bias"].float()
        yield f"{name}.bias", (whole if scale is None else whole * scale.float()).to(bias.dtype)


SHARED_VARIANT = Shared()
