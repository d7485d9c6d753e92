"""Tuning while pruning: what stays is learned together with the weights, after the dense model.

    change, carried = Tuning(model, family, lessons, reporter).heads(plan, limits, gates, members)

Source: PAT, arXiv 2408.14721; docs/decisions/healing.md says what differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.console import Reporter
from pruning.families import Family
from pruning.models.modeling import blocks_of
from pruning.plan import Plan, Sublayer
from pruning.recovery.distillation import Teacher
from pruning.recovery.emulation import Recovery
from pruning.recovery.gates import BudgetedGates, GatedHeads, GatedUnits
from pruning.recovery.healing import Prepared, first_block, prepared, scope_of
from pruning.recovery.training import Lessons, Training, text_of, train_until
from pruning.recovery.training_state import Carried
from pruning.variants.window import Window

GATED = 0.4  # of the budget in steps or time; the rest heals the hard plan
SOFT, HARD = 1.0, 0.02  # temperature at the start and at the end of the gates, in the unit of their scores
TRAVEL = 1.5  # that a gate's score moves by in all where its gradient stays at the root mean square of all gates
LARGEST_STEP = 3.0  # of one gate in one update, in root mean squares of all


@dataclass(frozen=True, slots=True)
class Gates:
    """What may stay, and what that is worth.

    Attributes:
        scores: Logarithm of what each is worth per unit of cost, float64 [n].
        costs: Of each, float64 [n].
        capacity: What all may cost.
    """

    scores: Tensor
    costs: Tensor
    capacity: float


class Annealing:
    """The guide of a training with gates: colder with every update, and steps of the gates.

    A gate's score moves against its gradient, in units of the root mean square over all gates. How far depends on the
    share of the budget that the update took, and falls linearly to nothing. So it is the same for many small and few
    large updates, and gates that are all but shut or open, which have little gradient, stay so.

    Source: inferred. Masks trained with the weights: PAT, arXiv 2408.14721; gates by KV head, on frozen weights:
        DuoAttention, arXiv 2410.10819.
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
            begin, end = (min(1.0, each / self._until) for each in (share, now))
            part = (1 - begin) ** 2 - (1 - end) ** 2  # of what is left, linearly less
            change -= TRAVEL * part * (change.grad / size).clamp(-LARGEST_STEP, LARGEST_STEP)
        change.grad = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """What gates and weights are trained with.

    Attributes:
        model: Dense model, left as it is.
        family: Where its parts are.
        lessons: Text and settings of the whole training.
        reporter: For progress.
        state: File to resume from; it is kept up to date, and stays.
    """

    model: PreTrainedModel
    family: Family
    lessons: Lessons
    reporter: Reporter
    state: Path | None = None

    def heads(
        self, plan: Plan, limits: Mapping[Sublayer, Window], gates: Gates, members: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Tensor, Carried]:
        """Train gates of KV heads, low-rank changes of the weights, and sinks, for the first part of the budget.

        Args:
            plan: With all these layers limited.
            limits: Every limited layer, left as it is.
            gates: Between limited and full.
            members: (block, KV head) of each gate, several where they share one. Other heads are limited.

        Returns:
            What training adds to the scores of the gates, float64 [n], all zero without an update; and what was
            trained of the weights, for `heal` to go on from.
        """
        recovery = Recovery(dict(limits), {})
        training = self._prepared(plan, recovery, first_block(limits, "lora"))
        rows = {block: number for number, block in enumerate(sorted({block for own in members for block, _ in own}))}
        windows = [cast(Window, training.emulations[Sublayer(block, "attention")]) for block in rows]
        numbers = torch.full((len(rows), windows[0].kv_heads), len(members))
        for number, own in enumerate(members):
            for block, head in own:
                numbers[rows[block], head] = number
        budgeted = self._gates(gates)
        student = GatedHeads(training.student, budgeted, windows, numbers.to(self.model.device))
        return self._train(student, budgeted, training, recovery, first_block(limits, "lora"), str(members))

    def units(self, recovery: Recovery, gates: Gates, groups: Mapping[int, Sequence[Tensor]]) -> tuple[Tensor, Carried]:
        """Train gates of FFN units in groups and low-rank changes of the weights, for the first part of the budget.

        Args:
            recovery: Weights to begin with instead of the dense model's; nothing is gone.
            gates: Between gone and kept.
            groups: Block -> the units of each of its gates, int64 [m]; gates are numbered in this order. Other units
                stay.

        Returns:
            As `heads`; the changes are in `Carried` by the names of the dense model's linear maps.
        """
        family = self.family
        first = max(0, min(groups) - 1)
        training = self._prepared(Plan(len(blocks_of(self.model, family)), {}), recovery, first)
        projections = [training.changes[f"{family.blocks}.{b}.{family.ffn}.{family.ffn_output}"] for b in groups]
        count = sum(map(len, groups.values()))
        numbers, number = torch.full((len(groups), projections[0].in_features), count), 0
        for row, own in enumerate(groups.values()):
            for units in own:
                numbers[row, units] = number
                number += 1
        budgeted = self._gates(gates)
        student = GatedUnits(training.student, budgeted, projections, numbers.to(self.model.device))
        return self._train(student, budgeted, training, recovery, first, text_of(numbers))

    def _prepared(self, plan: Plan, recovery: Recovery, first: int) -> Prepared:
        return prepared(self.model, self.family, plan, recovery, first, self.lessons.settings)

    def _gates(self, gates: Gates) -> BudgetedGates:
        return BudgetedGates(gates.scores, gates.costs, gates.capacity).to(self.model.device)

    def _train(
        self, student: nn.Module, gates: BudgetedGates, training: Prepared, recovery: Recovery, first: int, about: str
    ) -> tuple[Tensor, Carried]:
        lessons = self.lessons
        given = [gates.get_buffer(name).tolist() for name in ("scores", "costs")]
        scope = f"gates {about} {given} {gates.capacity}"
        scope = f"{scope} {scope_of(lessons.scope, lessons.settings, recovery, lessons.rows)}"
        carried = train_until(
            Training(student, training.parameters, {"gates": gates.change}), Teacher(self.model, self.family, first),
            Annealing(gates, GATED), GATED, lessons.rows, lessons.settings, self.reporter, self.state, scope,
        )  # fmt: skip
        with torch.no_grad():
            soft = int(((gates() - 0.5).abs() < 0.49).sum())
        self.reporter.say(f"gates: {len(gates.change)} trained for {carried.step} steps, {soft} not 0 or 1 in the end")
        return gates.change.detach().double().cpu(), carried
