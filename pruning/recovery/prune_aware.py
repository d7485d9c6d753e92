"""Tuning while pruning: what stays is learned together with the weights, after the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.console import Reporter
from pruning.families import Family
from pruning.plan import Plan, Sublayer
from pruning.recovery.distillation import Teacher
from pruning.recovery.emulation import Recovery
from pruning.recovery.gates import BudgetedGates, GatedHeads
from pruning.recovery.healing import first_block, prepared, scope_of
from pruning.recovery.training import Settings, Training, train_until
from pruning.recovery.training_state import Carried
from pruning.variants.window import Window

GATED = 0.4  # of the budget in steps or time; the rest heals the hard plan
SOFT, HARD = 1.0, 0.02  # temperature at the start and at the end of the gates, in the unit of their scores
TRAVEL = 3.0  # that a gate's score moves by in all where the gradient stays at the mean square of all gates
LARGEST_STEP = 3.0  # of one gate in one update, in root mean squares of all


@dataclass(frozen=True, slots=True)
class Gates:
    """What may stay full of the KV heads of limited layers, and what that is worth.

    Attributes:
        heads: (block, KV head) of each gate, several where they share one.
        scores: Logarithm of what each is worth per unit of cost, float64 [n].
        costs: Of each, float64 [n].
        capacity: What all may cost.
    """

    heads: Sequence[Sequence[tuple[int, int]]]
    scores: Tensor
    costs: Tensor
    capacity: float


class Annealing:
    """The guide of a training with gates: colder with every update, and steps of the gates.

    A gate's score moves against its gradient, in units of the root mean square over all gates. How far depends on the
    share of the budget that the update took. So it is the same for many small and few large updates, and gates that
    are all but shut or open, which have little gradient, stay so.

    Source: inferred. PAT (arXiv 2408.14721) has a regulariser push its masks to 0 and 1.
    """

    def __init__(self, gates: BudgetedGates, until: float) -> None:
        self._gates, self._until = gates, until

    def before(self, share: float) -> None:
        """Set the temperature, geometrically from soft to hard."""
        self._gates.temperature = SOFT * (HARD / SOFT) ** min(1.0, share / self._until)

    @torch.no_grad()
    def after(self, share: float, now: float) -> None:
        """Move the scores."""
        change = self._gates.change
        if change.grad is None:
            return
        size = change.grad.square().mean().sqrt()
        if torch.isfinite(size) and size > 0:
            part = (min(now, self._until) - share) / self._until
            change -= TRAVEL * part * (change.grad / size).clamp(-LARGEST_STEP, LARGEST_STEP)
        change.grad = None


def tune(
    model: PreTrainedModel, family: Family, plan: Plan, limits: Mapping[Sublayer, Window], gates: Gates, rows: Tensor,
    settings: Settings, reporter: Reporter, *, state: Path | None = None, scope: str = "",
) -> tuple[Tensor, Carried]:  # fmt: skip
    """Train gates of KV heads, low-rank changes of the weights, and sinks together, for the first part of the budget.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        plan: With all these layers limited.
        limits: Every limited layer, left as it is.
        gates: Between full and limited.
        rows: Windows to train on, int64 [n, T].
        settings: Of the whole training.
        reporter: For progress.
        state: File to resume from; it is kept up to date, and stays when this returns.
        scope: What the state depends on besides the arguments.

    Returns:
        What training adds to the scores of the gates, float64 [n], all zero without an update; and what was trained
        of the weights, for `heal` to go on from.
    """
    recovery = Recovery(dict(limits), {})
    first = first_block(recovery.emulations, settings.trained)
    training = prepared(model, family, plan, recovery, first, settings)
    blocks = {block for members in gates.heads for block, _ in members}
    windows = {
        sublayer: cast(Window, module) for sublayer, module in training.emulations.items() if sublayer.block in blocks
    }
    budgeted = BudgetedGates(gates.scores, gates.costs, gates.capacity).to(model.device)
    student = GatedHeads(training.student, budgeted, windows, gates.heads)
    carried = train_until(
        Training(student, training.parameters, {"gates": budgeted.change}), Teacher(model, family, first),
        Annealing(budgeted, GATED), GATED, rows, settings, reporter, state,
        f"gates {gates.heads} {gates.scores.tolist()} {gates.costs.tolist()} {gates.capacity} "
        f"{scope_of(scope, settings, recovery, rows)}",
    )  # fmt: skip
    with torch.no_grad():
        soft = ((budgeted() - 0.5).abs() < 0.49).sum()
    reporter.say(f"gates: {len(gates.heads)} trained for {carried.step} steps, {int(soft)} of them not 0 or 1 yet")
    return budgeted.change.detach().double().cpu(), carried
