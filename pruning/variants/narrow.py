"""`narrow`: an FFN of fewer units. What it becomes is an ordinary FFN; how units are chosen is in `narrow_fit.py`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import RecipeError
from pruning.families import Family
from pruning.variants.base import Emulation, Job, Shape, Variant

WIDE, MULTIPLE, SMALL_MULTIPLE = 1024, 128, 8


class Narrow(Emulation):
    """A gated FFN that keeps some of its units.

    Args:
        ffn: Of the family's own class, with fewer units.
        output: Attribute of `ffn` that holds the output projection.

    Source: Adapt-Pruner, arXiv 2502.03460, prunes units with a width for each layer.
    """

    in_place = True

    def __init__(self, ffn: nn.Module, output: str) -> None:
        super().__init__()
        self.ffn, self.output = ffn, output

    @property
    def projection(self) -> nn.Linear:
        """The output projection [D, n]."""
        found: nn.Linear = self.ffn.get_submodule(self.output)
        return found

    def entry(self) -> dict[str, Any]:
        """The checkpoint's entry of the sublayer: that of any FFN whose size is its own."""
        return {"no_op": False, "emulation": None, "intermediate_size": self.projection.in_features}

    def inside(self, sublayer: nn.Module) -> nn.Module:
        """The FFN itself."""
        return self.ffn


def multiple_of(size: int) -> int:
    """Units that an FFN of `size` units loses at a time, so that kernels and tensor parallelism can split the rest."""
    return MULTIPLE if size >= WIDE else SMALL_MULTIPLE


def narrowed(ffn: nn.Module, output: str, config: Any, units: Tensor) -> Narrow:
    """An FFN that keeps some units as they are, in new memory.

    Args:
        ffn: Gated, with linear maps of F units.
        output: Attribute of `ffn` that holds the output projection.
        config: Of the model.
        units: The numbers of those that stay, int64 [n].
    """
    projection = ffn.get_submodule(output)
    assert isinstance(projection, nn.Linear)
    size = projection.in_features
    state: dict[str, Tensor] = {}
    for name, tensor in ffn.state_dict().items():
        if name == f"{output}.weight":
            state[name] = tensor[:, units].clone()
        elif name.startswith(f"{output}."):
            state[name] = tensor.clone()
        else:  # F rows, or 2F where the gate is packed with them
            state[name] = torch.cat([part[units] for part in tensor.split(size)])
    own = copy.copy(config)
    own.intermediate_size = len(units)
    with torch.device("meta"):
        made = type(ffn)(own)
    made.load_state_dict(state, assign=True)
    return Narrow(made.eval().requires_grad_(False), output)


class NarrowVariant(Variant):
    """The kind."""

    title = "the narrower FFN"
    in_place = True

    def check(self, family: Family, config: Any) -> None:
        """Refuse mixtures of experts."""
        if family.ffn_output is None:
            raise RecipeError(f"--emulation narrow is for dense FFNs, and {family.name} has experts; choose another")
        least = multiple_of(config.intermediate_size)
        if config.intermediate_size <= least:
            raise RecipeError(
                f"--emulation narrow: FFNs of {config.intermediate_size} units cannot lose {least}; choose another"
            )

    def fit(self, job: Job) -> Narrow:
        """The units that `narrow_fit` chose, with a refitted output projection."""
        from pruning.variants.narrow_fit import refitted

        return refitted(job)

    def weight_bytes(self, shape: Shape) -> int:
        """Those of the sublayer less the units that go; an FFN of which nothing says so keeps all."""
        if shape.units is None or shape.output is None:
            return shape.whole
        width = shape.maps[shape.output][0]
        others = [each for place, each in enumerate(shape.maps) if place != shape.output]
        each = shape.maps[shape.output][1] + sum((size + biased) * units // width for size, units, biased in others)
        return shape.whole - (width - shape.units) * each * shape.dtype_bytes


NARROW = NarrowVariant()
