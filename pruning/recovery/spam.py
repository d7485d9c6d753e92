"""SPAM: Adam that clips gradient spikes entry by entry and forgets its momentum at intervals."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class SPAM(torch.optim.Optimizer):
    """Spike-Aware Adam with Momentum Reset.

    An entry g of the gradient is a spike where g^2 > theta v, v the running second moment before this step; it is
    replaced by sign(g) sqrt(theta v). Every `interval` steps both moments are set to zero and the learning rate rises
    again over `warmup` steps by half a cosine.

    Args:
        parameters: What to train.
        lr: Learning rate.
        theta: Spike threshold.
        interval: Steps between resets of the moments.
        warmup: Steps of reduced learning rate after a reset.
        weight_decay: Decoupled, as in AdamW.

    Source: arXiv 2501.06842, algorithm 1; theta 5000, interval 500 and warmup 150 are its defaults. Inferred: v is
        corrected for its start at zero before it is compared, and nothing is clipped where it is zero (in the first
        step and in that after a reset, which otherwise could not move); the warm-up is of resets only, since the
        schedule has one of its own at the start. Its sparse momentum is left out: adapters are small.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        theta: float = 5000.0,
        interval: int = 500,
        warmup: int = 150,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "theta": theta, "interval": interval, "warmup": warmup, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        done, interval = int(state["step"]), group["interval"]
        age = done % interval
        if age == 0:
            first.zero_()
            second.zero_()
        else:
            bound = (second * (group["theta"] / (1 - BETAS[1] ** age))).sqrt_()
            # Where nothing was ever seen there is nothing to compare with.
            bound.masked_fill_(bound == 0, math.inf)
            gradient = torch.minimum(torch.maximum(gradient, -bound), bound)
        state["step"] += 1
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate = group["lr"] * rewarmed(age, group["warmup"] if done >= interval else 0)
        parameter.mul_(1 - rate * group["weight_decay"])
        root = (second / (1 - BETAS[1] ** (age + 1))).sqrt_().add_(EPSILON)
        parameter.addcdiv_(first, root, value=-rate / (1 - BETAS[0] ** (age + 1)))


def rewarmed(age: int, warmup: int) -> float:
    """Share of the learning rate `age` steps after a reset: half a cosine from 0 to 1 over `warmup` steps."""
    if age >= warmup:
        return 1.0
    return 0.5 - 0.5 * math.cos(math.pi * (age + 1) / (warmup + 1))
