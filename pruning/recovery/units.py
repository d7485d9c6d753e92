"""Linear maps as ordinary FFN units: what an FFN act(G x) * (U x) can be given without a new operation.

A unit whose gate row is zero and whose gate bias is β gives act(β) (u x): it is linear. So an affine map of rank r of
what an FFN reads is r more units and a bias of that FFN. Where a family's FFNs have no biases, the gate row is the
direction in which the FFN's input is most nearly constant, and the map is fitted through the gate as it is.

Source: inferred; exactness is tested.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruning.plan import padded_size
from pruning.regression import Affine, HeldOutMoments, NormalEquations, solve

GATE = 1.0
GATE_RIDGE = 1e-6


@dataclass(frozen=True, slots=True)
class Units:
    """What is added to one FFN: n units and, where the family has biases, a constant.

    Attributes:
        gate: [n, D].
        up: [n, D].
        down: [D, n].
        gate_bias: [n]; None where FFNs have no biases.
        bias: [D]; None where FFNs have no biases.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, size: int, like: Tensor, biased: bool) -> "Units":
        """`size` units that add nothing, for the width, dtype and device of `like` [..., D]."""
        width = like.shape[-1]
        return cls(
            like.new_zeros(size, width), like.new_zeros(size, width), like.new_zeros(width, size),
            like.new_zeros(size) if biased else None, like.new_zeros(width) if biased else None,
        )  # fmt: skip

    def update(self, x: Tensor, act: nn.Module) -> Tensor:
        """What the units add for the FFN's input [..., D]."""
        gate = nn.functional.linear(x, self.gate, self.gate_bias)
        return nn.functional.linear(act(gate) * (x @ self.up.T), self.down, self.bias)

    def plus(self, other: "Units") -> "Units":
        """Both together."""
        return Units(
            torch.cat([self.gate, other.gate]),
            torch.cat([self.up, other.up]),
            torch.cat([self.down, other.down], 1),
            None if self.gate_bias is None or other.gate_bias is None else torch.cat([self.gate_bias, other.gate_bias]),
            None if self.bias is None or other.bias is None else self.bias + other.bias,
        )

    def padded(self, size: int) -> "Units":
        """With zero units until an FFN of `size` units gains a multiple of 8, so that tensor parallelism can split it.

        An FFN that has no units at all (`size` 0) gets at least 8.
        """
        total = size + len(self.up)
        return self.plus(Units.zeros(padded_size(total) - total, self.up, self.bias is not None))


@dataclass(frozen=True, slots=True)
class Gate:
    """How linear units hold their gate: at a bias, or along a direction [D] in which the input is nearly constant."""

    act: nn.Module
    direction: Tensor | None = None

    @classmethod
    def along(cls, act: nn.Module, rows: Iterable[tuple[Tensor, Tensor]]) -> "Gate":
        """The gate without bias: the ridge map of inputs x [n, D], with weights [n], to a constant."""
        moments: NormalEquations | None = None
        for x, weights in rows:
            moments = moments or NormalEquations.zeros(x.shape[1], 1)
            moments.add(x, torch.full((len(x), 1), GATE), weights)
        assert moments is not None
        return cls(act, solve(moments.xx, moments.xy, GATE_RIDGE)[:, 0].to(x))

    def features(self, x: Tensor) -> Tensor:
        """What a unit's up row multiplies: act(gate) x for x [..., D]."""
        if self.direction is None:
            return x * self.act(torch.tensor(GATE)).to(x)
        return x * self.act(x @ self.direction)[..., None]

    def fit(self, moments: HeldOutMoments, rank: int, like: Tensor, *, judged: bool = False) -> tuple[Units, Tensor]:
        """The best units for the moments of features and updates.

        Args:
            moments: The first D features are `features` of the FFN's input; more may follow.
            rank: Of a map of the first D features; 0: a constant.
            like: Has the dtype, device and width wanted.
            judged: Whether held-out rows are left out, to be judged by.

        Returns:
            The units, and the map [more, D] float64 of the other features.
        """
        width = like.shape[-1]
        if not rank and self.direction is None:
            both = moments.fitted(judged)
            units = replace(Units.zeros(0, like, True), bias=(both.y_sum / both.weight).to(like))
            return units, torch.zeros(0, width, dtype=torch.float64)
        fitted = moments.partly_low_rank(width, max(1, rank), intercept=self.direction is None, judged=judged)
        units = linear_units(fitted.low, like)
        if self.direction is not None:
            gate = self.direction.repeat(len(units.up), 1).to(like)
            units = replace(units, gate=gate, gate_bias=None, bias=None)
        return units, fitted.free


def linear_units(affine: Affine, like: Tensor) -> Units:
    """Units that add an affine map of `Gate.features`, exactly, for FFNs with biases."""
    units = Units.zeros(affine.down.shape[1], like, True)
    return replace(
        units, up=affine.down.T.to(like), down=affine.up.T.to(like), bias=affine.bias.to(like),
        gate_bias=torch.full_like(units.up[:, 0], GATE),
    )  # fmt: skip


def widened(ffn: nn.Module, config: Any, units: Units, replaced: bool) -> nn.Module:
    """An FFN of the same class with more units.

    Args:
        ffn: With `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and `down_proj`.
        config: Of the model.
        units: To add.
        replaced: Whether the FFN's own units go.

    Returns:
        A new module in evaluation mode that shares nothing with the old one.
    """
    old = {name: tensor.detach() for name, tensor in ffn.state_dict().items()}
    size = 0 if replaced else old["down_proj.weight"].shape[1]
    units = units.padded(size)
    if packed := "gate_up_proj.weight" in old:
        old["gate_proj.weight"], old["up_proj.weight"] = old.pop("gate_up_proj.weight").chunk(2)
    new = {
        "gate_proj.weight": torch.cat([old["gate_proj.weight"][:size], units.gate]),
        "up_proj.weight": torch.cat([old["up_proj.weight"][:size], units.up]),
        "down_proj.weight": torch.cat([old["down_proj.weight"][:, :size], units.down], 1),
    }
    if units.gate_bias is not None and units.bias is not None:
        none = torch.zeros_like(new["up_proj.weight"][:, 0])
        new["gate_proj.bias"] = torch.cat([old.get("gate_proj.bias", none)[:size], units.gate_bias])
        new["up_proj.bias"] = torch.cat([old.get("up_proj.bias", none)[:size], none[size:]])
        own = old.get("down_proj.bias")
        new["down_proj.bias"] = units.bias if own is None or replaced else own + units.bias
    if packed:
        new["gate_up_proj.weight"] = torch.cat([new.pop("gate_proj.weight"), new.pop("up_proj.weight")])
    own_config = copy.copy(config)
    own_config.intermediate_size = units.up.shape[0] + size
    with torch.device("meta"):
        module = type(ffn)(own_config)
    module.load_state_dict(new, assign=True)
    return module.eval().requires_grad_(False)
