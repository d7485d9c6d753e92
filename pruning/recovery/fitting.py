"""Fit the emulations of many plans in one walk through the model: what plans share is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.forward.blocks import Taps
from pruning.forward.evaluator import Evaluator
from pruning.forward.walk import Seen, forget_taps
from pruning.plan import KINDS, EmulationKind, Sublayer
from pruning.recovery.emulation import fit, sources_read
from pruning.variants.base import Emulation, Job

Removed = Mapping[Sublayer, EmulationKind]
"""Removed sublayers and the kind of their emulation."""

Fitted = dict[Sublayer, Emulation | None]
"""Removed sublayers and what emulates each (None: nothing)."""


@dataclass(slots=True)
class _Stream:
    """The residual stream of the plans that are alike so far.

    Attributes:
        plans: Their numbers; only those that still lose something.
        hidden: Batches of [b, T, D]; None as long as it is the dense model's.
        taps: What its attention layers put out, for each batch.
    """

    plans: list[int]
    hidden: list[Tensor] | None
    taps: list[Taps]


def together(evaluator: Evaluator, plans: Sequence[Removed], most: int) -> list[list[int]]:
    """Numbers of the plans in groups to fit in one walk: like ones together, at most `most` and what memory allows."""
    order = sorted(range(len(plans)), key=lambda number: (sorted(plans[number]), number))
    tokens = sum(batch.numel() for batch in evaluator.batches)
    stream = tokens * evaluator.model.config.hidden_size * evaluator.model.dtype.itemsize
    size = max(1, min(most, evaluator.state_bytes // stream))
    return [order[first : first + size] for first in range(0, len(order), size)]


@torch.no_grad()
def fit_plans(
    evaluator: Evaluator,
    plans: Sequence[Removed],
    rank: int,
    reporter: Reporter,
    sources: int = 1,
    window: int = 0,
) -> list[Fitted]:
    """The emulations of every plan, each as `emulation.fit_plan` fits it alone.

    A fit depends on the plan only by what is removed before it, so plans share one stream, and its fits, until they
    differ; the dense stream they all aim at is computed once, and a stream ends with the last thing it loses.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        plans: In any order; similar ones are cheapest, see `together`.
        rank: r of the adapters.
        reporter: For progress.
        sources: k, kept attention layers that a `context` adapter reads.
        window: Positions that a limited layer keeps.
    """
    fitted: list[Fitted] = [{} for _ in plans]
    last = [max(plan, key=_position, default=None) for plan in plans]
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense, arguments = [hidden for hidden, _ in embedded], [kwargs for _, kwargs in embedded]
    noted: list[Taps] = [{} for _ in dense]
    del embedded
    reads = [sources_read(evaluator, plan, sources) for plan in plans]
    wanted = {block for each in reads for read in each.values() for block in read}
    streams = [_Stream([number for number, plan in enumerate(plans) if plan], None, noted)]
    blocks = range(max((end.block for end in last if end is not None), default=-1) + 1)
    with reporter.progress("emulations of plans", len(blocks)) as step:
        for index in blocks:
            kwargs = [every[index] for every in arguments]
            for kind in KINDS:
                sublayer, before = Sublayer(index, kind), dense
                dense = _advance(evaluator, sublayer, dense, kwargs, None, noted)
                following: list[_Stream] = []
                for stream in streams:
                    kept = [number for number in stream.plans if sublayer not in plans[number]]
                    if kept and stream.hidden is not None:
                        taps = [dict(each) for each in stream.taps]
                        hidden = _advance(evaluator, sublayer, stream.hidden, kwargs, None, taps)
                        following.append(_Stream(kept, hidden, taps))
                    elif kept:
                        following.append(_Stream(kept, None, noted))
                    for (how, read), members in _alike(sublayer, stream.plans, plans, reads).items():
                        inputs = before if stream.hidden is None else stream.hidden
                        seen = Seen(before, kwargs)
                        job = Job(evaluator, sublayer, inputs, dense, rank, stream.taps, window, read, seen)
                        module = fit(how, job)
                        for number in members:
                            fitted[number][sublayer] = module
                        if going_on := [number for number in members if last[number] != sublayer]:
                            taps = [dict(each) for each in stream.taps]
                            if module is not None:
                                inputs = _advance(evaluator, sublayer, inputs, kwargs, module, taps)
                            following.append(_Stream(going_on, inputs, taps))
                streams = following
            for taps in (noted, *(stream.taps for stream in streams)):
                forget_taps(taps, wanted)
            step.advance()
    return fitted


def _position(sublayer: Sublayer) -> tuple[int, int]:
    return sublayer.block, KINDS.index(sublayer.kind)


def _alike(
    sublayer: Sublayer,
    numbers: Sequence[int],
    plans: Sequence[Removed],
    reads: Sequence[Mapping[Sublayer, tuple[int, ...]]],
) -> dict[tuple[EmulationKind, tuple[int, ...]], list[int]]:
    """Plans that lose the sublayer, by the kind of its emulation and the blocks that one reads."""
    found: dict[tuple[EmulationKind, tuple[int, ...]], list[int]] = {}
    for number in numbers:
        if sublayer in plans[number]:
            alike = plans[number][sublayer], reads[number].get(sublayer, ())
            found.setdefault(alike, []).append(number)
    return found


def _advance(
    evaluator: Evaluator,
    sublayer: Sublayer,
    hidden: list[Tensor],
    kwargs: Sequence[Mapping[str, Any]],
    module: Emulation | None,
    taps: list[Taps],
) -> list[Tensor]:
    calls = zip(hidden, kwargs, taps, strict=True)
    return [evaluator.run_and_tap(sublayer, h, k, module, t) for h, k, t in calls]
