"""Gates between all and nothing (or less) within a budget, soft at first and hard in the end.

Each gate g in [0, 1] is the share of what stays. With s the score of a gate per unit of cost and c its cost, the gates

    g = sigmoid((s - level) / temperature),  level such that sum of c g = capacity

maximise sum of c (s g + temperature H(g)), H the entropy, among all gates within the capacity. So the budget holds at
every temperature, and at zero the gates are the linear relaxation of the knapsack that makes the hard plan: 0 or 1, but
for one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pruning.variants.window import Window

BISECTIONS = 60
BEYOND = 40.0  # temperatures beyond the scores, where all gates are shut or open


class BudgetedGates(nn.Module):
    """Gates whose costs add up to a capacity.

    Args:
        scores: Logarithm of what each is worth per unit of cost before training, float64 [n].
        costs: Over 0, float64 [n].
        capacity: In the unit of the costs.

    Attributes:
        change: What training adds to the scores, float32 [n].
        temperature: Of the gates, in the unit of the scores.

    Source: inferred. Smoothed linear programmes by entropy as in optimal transport, arXiv 1306.0895.
    """

    def __init__(self, scores: Tensor, costs: Tensor, capacity: float) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(len(scores)))
        self.register_buffer("scores", scores.double(), persistent=False)
        self.register_buffer("costs", costs.double(), persistent=False)
        self.capacity, self.temperature = capacity, 1.0

    def forward(self) -> Tensor:
        """The gates, float64 [n]; the gradient sees that what one gains others lose."""
        scores, costs = self.get_buffer("scores"), self.get_buffer("costs")
        if self.capacity >= float(costs.sum()) or self.capacity <= 0:
            return torch.full_like(scores, float(self.capacity > 0))
        scores = scores + self.change.double()
        with torch.no_grad():
            level = self._level(scores)
            gates = torch.sigmoid((scores - level) / self.temperature)
            slope = (costs * gates * (1 - gates)).sum().clamp_min(1e-12) / self.temperature
        # One Newton step from the root does not move it, and has the gradient of the root by the scores.
        off = (costs * torch.sigmoid((scores - level) / self.temperature)).sum() - self.capacity
        level = level + (off - off.detach()) / slope
        return torch.sigmoid((scores - level) / self.temperature)

    def _level(self, scores: Tensor) -> Tensor:
        costs = self.get_buffer("costs")
        low, high = scores.min() - BEYOND * self.temperature, scores.max() + BEYOND * self.temperature
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            over = (costs * torch.sigmoid((scores - middle) / self.temperature)).sum() > self.capacity
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return (low + high) / 2


class GatedHeads(nn.Module):
    """A student whose limited attention layers are mixtures of full and limited, for each KV head.

    Args:
        student: With these windows in place.
        gates: Of heads.
        windows: Limited layers that have gates.
        numbers: The gate of each of their heads, int64 [len(windows), K]; one past the last: always limited.
    """

    def __init__(self, student: nn.Module, gates: BudgetedGates, windows: Sequence[Window], numbers: Tensor) -> None:
        super().__init__()
        self.student, self.gates = student, gates
        self._windows = list(windows)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, rows: Tensor, entering: Tensor) -> list[Tensor]:
        """As `Student.forward`."""
        found = self.gates()
        full = torch.cat([found, found.new_zeros(1)])[self.get_buffer("numbers")].float()
        for window, own in zip(self._windows, full, strict=True):
            window.gates = torch.stack([own, 1 - own], -1)[None]
        states: list[Tensor] = self.student(rows, entering)
        return states


class GatedUnits(nn.Module):
    """A student that multiplies what units of FFNs put out by gates.

    Args:
        student: Of which these modules are parts.
        gates: Of units in groups.
        projections: Output projections of FFNs that have gates.
        numbers: The gate of each of their units, int64 [len(projections), F]; one past the last: always open.
    """

    def __init__(
        self, student: nn.Module, gates: BudgetedGates, projections: Sequence[nn.Module], numbers: Tensor
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.gates = student, gates
        self._units: Tensor | None = None
        for number, projection in enumerate(projections):
            projection.register_forward_pre_hook(partial(self._scale, number))
        self.register_buffer("numbers", numbers, persistent=False)

    def _scale(self, number: int, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._units is not None
        return (arguments[0] * self._units[number].to(arguments[0].dtype), *arguments[1:])

    def forward(self, rows: Tensor, entering: Tensor) -> list[Tensor]:
        """As `Student.forward`."""
        found = self.gates()
        self._units = torch.cat([found, found.new_ones(1)])[self.get_buffer("numbers")].float()
        states: list[Tensor] = self.student(rows, entering)
        return states
