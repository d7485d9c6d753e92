"""Low-rank changes of frozen linear maps, trained beside them and merged into them afterwards."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALE = 2.0


class LoraLinear(nn.Linear):
    """A linear map whose weight W is frozen and changed by a product of rank r: W + 2 U D.

    Shares the parameters of the map it is made from. U starts at zero, so at first nothing is changed.

    Attributes:
        down: D, float32 [r, in].
        up: U, float32 [out, r].

    Source: LoRA, arXiv 2106.09685, section 4.1. Inferred: alpha = 2 r, no dropout, D normal with variance 1 / in.
    """

    down: nn.Parameter
    up: nn.Parameter

    @classmethod
    def beside(cls, linear: nn.Linear, rank: int, generator: torch.Generator) -> Self:
        """The map, with an untrained change of rank `rank`; the generator is on the CPU."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        place = linear.weight.device
        start = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        made.down = nn.Parameter(start.to(place))
        made.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=place))
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Output [..., out] for [..., in]."""
        change = functional.linear(SCALE * functional.linear(input, self.down), self.up)
        return functional.linear(input, self.weight, self.bias) + change

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The changed weight [out, in] in the dtype of W, summed in float32."""
        return (self.weight.float() + SCALE * self.up.float() @ self.down.float()).to(self.weight.dtype)


def add_lora(module: nn.Module, rank: int, generator: torch.Generator) -> dict[str, LoraLinear]:
    """Put a change beside every linear map inside a module, in place.

    Returns:
        The map's name inside the module -> what took its place.
    """
    made: dict[str, LoraLinear] = {}
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear:
            owner, _, attribute = name.rpartition(".")
            made[name] = LoraLinear.beside(linear, rank, generator)
            setattr(module.get_submodule(owner), attribute, made[name])
    return made
