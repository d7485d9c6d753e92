"""Fuse emulations into ordinary weights, so that a pruned model needs no operation that its family does not have.

The map of a removed attention layer goes into the FFN before it, which reads another input, so it is refitted; what it
adds is in the stream where attention would have added it. Or it goes into the FFN of its own block, which reads the
same input, but adds one sublayer later. The better of the two by held-out error is taken. A removed FFN becomes an FFN
of r units, and a run of removed blocks a linear map on the output of the FFN before it, folded into its projection.

An FFN's own output is a further feature that costs nothing, since a map of it is folded into the output projection.
So what reads the stream after an FFN (its input plus its output) can be had from inside it.

Source: the last map is ReplaceMe's (arXiv 2505.02819); bias as in arXiv 2407.16286; the rest is inferred.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.families import Family
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import Batches, Spilled
from pruning.forward.walk import enter, last_block
from pruning.models.modeling import blocks_of
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer
from pruning.recovery.compensation import compensate, output_projection
from pruning.recovery.recalibration import recalibrate
from pruning.recovery.units import Gate, Units, widened
from pruning.regression import HeldOutMoments, held_out, token_weights
from pruning.variants import REMOVED, variant

STREAMS = 8  # at most that `_Walk` holds at a time

Removed = Mapping[Sublayer, EmulationKind]


@dataclass(frozen=True, slots=True)
class Gain:
    """What one FFN adds besides its own output y: units of what it reads, and y T for T [D, D]."""

    units: Units | None
    turn: Tensor | None

    def update(self, x: Tensor, y: Tensor, act: nn.Module) -> Tensor:
        """What is added for what the FFN reads and its own output, [b, T, D] each."""
        update = torch.zeros_like(x) if self.units is None else self.units.update(x, act)
        return update if self.turn is None else update + y @ self.turn.to(y)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one FFN reads, and its own output; one [b, T, D] for each batch, made from the stream when asked for.

    Attributes:
        block: Of the FFN.
        norm: In front of it.
        entering: The pruned stream before it.
        after: The stream with its own output.
        scale: Of updates in the family.
    """

    block: int
    norm: nn.Module
    entering: Batches
    after: Batches
    scale: float

    def inputs(self) -> Iterator[Tensor]:
        """What it reads."""
        return (self.norm(hidden) for hidden in self.entering)

    def outputs(self) -> Iterator[Tensor]:
        """What it puts out."""
        return ((out - h) / self.scale for h, out in zip(self.entering, self.after, strict=True))


@dataclass(slots=True)
class Fusion:
    """What fusing changes in a dense model.

    Attributes:
        units: Block -> what its FFN gains.
        replaced: Blocks whose own FFN is gone, so that the units are all there is.
        turns: Block -> T [D, D]: its FFN's own output y becomes y + y T, folded into the output projection.
        weights: Parameter name in the dense model -> new weight, turns included.
        places: Sublayer -> "previous", "same" or "own": the FFN that took its emulation.
        errors: Sublayer -> place tried -> held-out squared error after the block, divided by that without emulation.
    """

    units: dict[int, Units] = field(default_factory=dict)
    replaced: set[int] = field(default_factory=set)
    turns: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    places: dict[Sublayer, str] = field(default_factory=dict)
    errors: dict[Sublayer, dict[str, float]] = field(default_factory=dict)

    def add(self, block: int, gain: "Gain") -> None:
        """Give an FFN more."""
        if gain.units is not None:
            self.units[block] = self.units[block].plus(gain.units) if block in self.units else gain.units
        if gain.turn is not None:
            self.turns[block] = self.turns[block] + gain.turn if block in self.turns else gain.turn

    def plan(self, plan: Plan) -> Plan:
        """The plan as the fused model shows it: fused attention is simply gone, an FFN of units is an FFN."""
        gone = [s for s in plan.removed if not (s.kind == "ffn" and s.block in self.replaced)]
        return Plan(plan.num_blocks, dict.fromkeys(gone, REMOVED))


def _refusal(family: Family) -> str | None:
    """Why a family's FFN cannot carry a map; None where it can."""
    if family.norms("ffn")[1] is not None:
        return f"{family.name} normalises what an FFN adds, so no map fits in"
    if family.parallel or family.ffn_norm is None:
        return f"{family.name} runs attention and FFN side by side, so an FFN does not see what attention added"
    if family.ffn_output is None:
        return f"{family.name} has experts, and no FFN that every token goes through"
    return None


def fusable(family: Family) -> bool:
    """Whether a family's FFNs can carry an emulation."""
    return _refusal(family) is None


def check_fusable(family: Family, removed: Removed) -> None:
    """Refuse what cannot be fused, before anything is fitted.

    Raises:
        RecipeError: The family's FFN cannot carry a map, an emulation cannot be written as one, or no FFN is near.
    """
    if (reason := _refusal(family)) is not None:
        raise RecipeError(f"--fuse: {reason}; leave --fuse out")
    for sublayer, kind in removed.items():
        if kind != REMOVED and variant(kind).rank_when_fused(1, 1) is None:
            raise RecipeError(
                f"--fuse: no FFN can hold the {kind} of {sublayer}; use --emulation low-rank, linear or bias"
            )
        if sublayer.kind == "attention" and kind != REMOVED and not places(sublayer, removed):
            raise RecipeError(f"--fuse: {sublayer} has no FFN before it or in its block; --keep {sublayer.block}")


def places(attention: Sublayer, removed: Removed) -> list[str]:
    """FFNs that can take a removed attention layer's emulation: "previous" (no attention runs in between), "same"."""
    found = []
    block = attention.block - 1
    while block >= 0 and removed.get(Sublayer(block, "ffn")) == REMOVED and Sublayer(block, "attention") in removed:
        block -= 1
    if block >= 0 and removed.get(Sublayer(block, "ffn")) != REMOVED:
        found.append("previous")
    if removed.get(Sublayer(attention.block, "ffn")) != REMOVED:
        found.append("same")
    return found


@torch.no_grad()
def fuse(
    evaluator: Evaluator, removed: Removed, rank: int, reporter: Reporter, *, biased: bool, compensated: bool = False,
    recalibrated: bool = False,
) -> Fusion:  # fmt: skip
    """Fit every emulation for the FFN that takes it, first to last, each on the stream as pruned and recovered so far.

    Args:
        evaluator: Of the dense model, which keeps its own weights.
        removed: Sublayer -> kind of emulation; checked by `check_fusable`.
        rank: Of the low-rank maps.
        reporter: For progress.
        biased: Whether FFNs may have biases.
        compensated: Whether output projections of kept sublayers are refitted too.
        recalibrated: Whether in the end the final norm is scaled.
    """
    walk = _Walk(evaluator, removed, rank, biased, compensated)
    last = last_block(evaluator, removed, to_the_end=compensated or recalibrated)
    with reporter.progress("fuse", last + 1) as step:
        for index in range(last + 1):
            walk.block(index)
            step.advance()
    fusion = walk.finish()
    if recalibrated:
        fusion.weights |= recalibrate(evaluator, walk.dense, walk.pruned, reporter)
    return fusion


def apply_fusion(model: PreTrainedModel, family: Family, fusion: Fusion) -> None:
    """Give a dense model the units, in place; before `apply_plan`, since blocks are counted as in the dense model."""
    config = model.config
    biased = any(units.bias is not None for units in fusion.units.values())
    if biased:
        config.mlp_bias = True
    for index, block in enumerate(blocks_of(model, family)):
        ffn = getattr(block, family.ffn)
        if index in fusion.units:
            setattr(block, family.ffn, widened(ffn, config, fusion.units[index], index in fusion.replaced))
        elif biased:
            for linear in ffn.children():
                if isinstance(linear, nn.Linear) and linear.bias is None:
                    zeros = linear.weight.new_zeros(linear.out_features)
                    linear.bias = nn.Parameter(zeros, requires_grad=False)


class _Walk:
    """The dense and the pruned streams on their way through the blocks; see `fuse`."""

    def __init__(self, evaluator: Evaluator, removed: Removed, rank: int, biased: bool, compensated: bool) -> None:
        self.evaluator, self.removed, self.rank = evaluator, removed, rank
        self.biased, self.compensated = biased, compensated
        self.family = evaluator.family
        self.scale = self.family.scale(evaluator.model.config)
        self.act = ACT2FN[evaluator.model.config.hidden_act]
        self.fusion = Fusion()
        self.dense, self.arguments = enter(evaluator, STREAMS)
        self.pruned = self.dense
        self.parted = False
        self.before: Reading | None = None
        counts = [len(batch) for batch in evaluator.batches]
        self.first = [sum(counts[:number]) for number in range(len(counts))]
        every = held_out(0, sum(counts))
        self.held = (every if every.any() else ~every).split(counts)

    def block(self, index: int) -> None:
        """Take the streams through one block."""
        attention, ffn = Sublayer(index, "attention"), Sublayer(index, "ffn")
        middle = self._run(attention, self.dense)
        end = self._run(ffn, middle)
        place = self._attention(attention, middle, end)
        self._ffn(ffn, end, place)
        self.dense = end
        if self._gone(index) and not self._gone(index + 1):
            self._patch()

    def _gone(self, index: int) -> bool:
        """Whether a block is removed as a whole with nothing in its place."""
        return all(self.removed.get(Sublayer(index, kind)) == REMOVED for kind in KINDS)

    def _attention(self, attention: Sublayer, middle: Batches, end: Batches) -> str:
        """Take the pruned streams through a block's attention; returns the place of its emulation, if it has one."""
        kind = self.removed.get(attention)
        if kind is None:
            self.pruned, self.before = self._kept(attention, middle), None
            return ""
        self.parted = True
        if kind == REMOVED:
            return ""
        place = self._choose(attention, kind, middle, end)
        self.fusion.places[attention] = place
        if place == "previous":
            assert self.before is not None
            self.pruned = self._gain(kind, self.before, self.pruned, middle)
        return place

    def _ffn(self, ffn: Sublayer, end: Batches, place: str) -> None:
        """Take the pruned streams through a block's FFN, or what takes its place, and the units it gains."""
        entering, kind = self.pruned, self.removed.get(ffn)
        if kind == REMOVED:
            self.parted = True
            return
        if kind is None:
            after = self._kept(ffn, end)
        else:
            after, self.parted = entering, True
            self.fusion.replaced.add(ffn.block)
            self.fusion.places[ffn] = "own"
        self.before = self._reading(ffn.block, entering, after)
        if place == "same" or kind is not None:
            after = self._gain(kind or self.removed[Sublayer(ffn.block, "attention")], self.before, after, end)
        self.pruned = after

    def _patch(self) -> None:
        """Turn the output of the FFN before a run of removed blocks, where that helps on held-out windows."""
        if self.before is None or self.before.block in self.fusion.replaced:
            return
        correction = self._moments(self.before.outputs(), self.pruned, self.dense).correction()
        if correction is not None:
            gain = Gain(None, correction)
            self.fusion.add(self.before.block, gain)
            self.pruned = self._held(self._with(gain, self.before, self.pruned))

    def _gain(self, kind: EmulationKind, reading: Reading, after: Batches, targets: Batches) -> Batches:
        """Give an FFN what takes the stream `after` to the dense `targets`; returns the stream with it."""
        gain = self._fit(kind, reading, after, targets)
        self.fusion.add(reading.block, gain)
        return self._held(self._with(gain, reading, after))

    def _choose(self, attention: Sublayer, kind: EmulationKind, middle: Batches, end: Batches) -> str:
        """The place of least error after the block on held-out windows, of fits on the others.

        Args:
            attention: Removed.
            kind: Of its emulation.
            middle: Dense streams after the attention.
            end: Dense streams after the block.
        """
        ffn = Sublayer(attention.block, "ffn")
        possible = places(attention, self.removed)
        if len(possible) == 1 or ffn in self.removed:
            return possible[0]
        assert self.before is not None
        gain = self._fit(kind, self.before, self.pruned, middle, judged=True)
        previous = self._error(self._through(ffn, self._with(gain, self.before, self.pruned)), end)
        after = self._run(ffn, self.pruned)
        reading = self._reading(ffn.block, self.pruned, after)
        gain = self._fit(kind, reading, after, end, judged=True)
        same = self._error(self._with(gain, reading, after), end)
        nothing = self._error(after, end)
        errors = {"previous": previous / nothing, "same": same / nothing}
        self.fusion.errors[attention] = errors
        return min(errors, key=lambda place: errors[place])

    def _error(self, streams: Iterable[Tensor], targets: Batches) -> float:
        """Weighted squared distance to the dense streams over the held-out windows."""
        total = 0.0
        for held, stream, target in zip(self.held, streams, targets, strict=True):
            if held.any():
                square = (target[held].float() - stream[held].float()).pow(2).sum(-1).double().flatten()
                total += float(square @ token_weights(target[held]))
        return total

    def _held(self, streams: Iterable[Tensor]) -> Batches:
        """Batches that are made one batch after the other, kept where the walk keeps its streams."""
        held: Batches = [] if isinstance(self.dense, list) else Spilled()
        for hidden in streams:
            held.append(hidden)
        return held

    def _through(self, sublayer: Sublayer, streams: Iterable[Tensor]) -> Iterator[Tensor]:
        """A sublayer of the dense model on streams, one batch after the other."""
        for hidden, every in zip(streams, self.arguments, strict=True):
            yield self.evaluator.run_sublayer(sublayer, hidden, every[sublayer.block])

    def _run(self, sublayer: Sublayer, streams: Batches) -> Batches:
        """A sublayer of the dense model on streams."""
        return self._held(self._through(sublayer, streams))

    def _kept(self, sublayer: Sublayer, target: Batches) -> Batches:
        """The pruned streams after a kept sublayer, compensated towards the dense `target` if asked."""
        if not self.parted:
            return target
        if not self.compensated:
            return self._run(sublayer, self.pruned)
        after = self.pruned.copy()
        self.fusion.weights |= compensate(
            self.evaluator, sublayer, after, target, self.arguments, taps=[{} for _ in self.arguments], wanted={}
        )  # fmt: skip
        return after

    def _reading(self, block: int, entering: Batches, after: Batches) -> Reading:
        """What the FFN of a block reads of one stream, with the other as what it makes of it."""
        assert self.family.ffn_norm is not None
        norm = getattr(self.evaluator.blocks[block], self.family.ffn_norm)
        return Reading(block, norm, entering, after, self.scale)

    def _fit(
        self, kind: EmulationKind, reading: Reading, after: Batches, targets: Batches, *, judged: bool = False
    ) -> Gain:
        """What an FFN has to add to take the stream `after` to the dense `targets`.

        A map reads the FFN's input and its own output together: what it makes of the first has the rank asked for and
        becomes units, what it makes of the second is free and becomes a turn. With `judged`, held-out windows are left
        out of the fit.
        """
        gate = Gate(self.act)
        if not self.biased:
            rows = (x.flatten(0, -2).float() for x in reading.inputs())
            gate = Gate.along(self.act, zip(rows, map(token_weights, targets), strict=True))
        rank = variant(kind).rank_when_fused(self.rank, after[0].shape[-1])
        assert rank is not None  # checked by `check_fusable`
        turned = rank > 0 and reading.block not in self.fusion.replaced
        moments = self._moments(_features(gate, reading, turned), after, targets)
        units, rest = gate.fit(moments, rank, after[0], judged=judged)
        return Gain(units, rest if turned else None)

    def _moments(self, features: Iterable[Tensor], after: Batches, targets: Batches) -> HeldOutMoments:
        """Moments of features and of what is missing from the stream `after`."""
        moments: HeldOutMoments | None = None
        for first, x, stream, target in zip(self.first, features, after, targets, strict=True):
            moments = moments or HeldOutMoments.zeros(x.shape[-1], stream.shape[-1])
            missing, windows = (target.float() - stream.float()) / self.scale, target.shape[:-1]
            moments.add_windows(first, x.float().view(*windows, -1), missing, token_weights(target).view(windows))
        assert moments is not None
        return moments

    def _with(self, gain: Gain, reading: Reading, after: Batches) -> Iterator[Tensor]:
        """The stream with what an FFN gained, one batch after the other."""
        for h, x, y in zip(after, reading.inputs(), reading.outputs(), strict=True):
            yield h + self.scale * gain.update(x, y, self.act)

    def finish(self) -> Fusion:
        """Fold the turns into the output projections."""
        for block, turn in self.fusion.turns.items():
            name = output_projection(self.family, Sublayer(block, "ffn"))
            for parameter in (f"{self.family.blocks}.{block}.{name}.{part}" for part in ("weight", "bias")):
                if parameter in dict(self.evaluator.model.named_parameters()):
                    old = self.fusion.weights.get(parameter, self.evaluator.model.get_parameter(parameter))
                    whole = torch.eye(len(turn), dtype=turn.dtype) + turn.T
                    self.fusion.weights[parameter] = (whole.to(old.device) @ old.double()).to(old.dtype)
        return self.fusion


def _features(gate: Gate, reading: Reading, turned: bool) -> Iterator[Tensor]:
    """What a map reads: the FFN's input behind the gate and, for a turn, its own output; float32 [n, D] or [n, 2D]."""
    for x, y in zip(reading.inputs(), reading.outputs(), strict=True):
        behind = gate.features(x.flatten(0, -2).float())
        yield torch.cat([behind, y.flatten(0, -2).float()], 1) if turned else behind
