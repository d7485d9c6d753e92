"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.console import Reporter
from pruning.finite import check_tensors
from pruning.forward.blocks import Arguments, Taps
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import Batches, SpilledNames
from pruning.forward.walk import Seen, advance, enter, forget_taps, last_block
from pruning.plan import KINDS, EmulationKind, Sublayer
from pruning.recovery.compensation import compensate
from pruning.recovery.recalibration import recalibrate
from pruning.variants import REMOVED, variant
from pruning.variants.base import Emulation, Job


@dataclass(frozen=True, slots=True)
class Recovery:
    """What makes up for the removed sublayers.

    Attributes:
        emulations: Sublayer -> module, None where nothing emulates it.
        weights: Parameter name in the dense model -> compensated weight; in a file where blocks are read from disk.
    """

    emulations: dict[Sublayer, Emulation | None]
    weights: MutableMapping[str, Tensor]


@torch.no_grad()
def recover(
    evaluator: Evaluator,
    removed: Mapping[Sublayer, EmulationKind],
    rank: int,
    reporter: Reporter,
    *,
    compensated: bool = True,
    sequential: bool = True,
    sources: int = 1,
    window: int = 0,
    prepared: Mapping[Sublayer, Any] | None = None,
    recalibrated: bool = False,
) -> Recovery:
    """Fit the emulation of every removed sublayer and, if asked, refit what is kept, first to last.

    Each fit sees the residual stream of the model as pruned and recovered so far and aims at the dense model's
    stream after the sublayer, so later fits also mend what earlier ones missed. The model keeps its own weights.

    When compensated, the FFN before a run of blocks that go as a whole is refitted towards the dense stream after the
    run: ReplaceMe's patch (arXiv 2505.02819) with the FFN's activations as regressors in place of its output, which
    holds their D x D map and more, and costs no parameter.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        removed: Sublayer -> kind of emulation.
        rank: r of the adapters.
        reporter: For progress.
        compensated: Also refit the output projections of kept sublayers.
        sequential: False fits every adapter on the dense model's own stream instead.
        sources: k, kept attention layers that a `context` adapter reads.
        window: Positions that a limited layer keeps.
        prepared: What `prepare` gives, where it is known.
        recalibrated: In the end also scale the final norm.
    """
    if prepared is None:
        prepared = prepare(evaluator, removed, rank, window, reporter)
    if not (compensated or recalibrated or any(map(_walks, removed.values()))):
        return Recovery({sublayer: prepared.get(sublayer) for sublayer in sorted(removed)}, {})
    emulations: dict[Sublayer, Emulation | None] = {}
    residency = evaluator.residency
    weights: MutableMapping[str, Tensor] = {} if residency.keeps_blocks else SpilledNames()
    dense, arguments = enter(evaluator)
    pruned = dense  # as long as nothing is gone
    taps: list[Taps] = [{} for _ in arguments]
    reads = sources_read(evaluator, removed, sources)
    runs = _runs(removed, len(evaluator.blocks)) if compensated else {}
    last = last_block(evaluator, removed, to_the_end=compensated or recalibrated)
    with reporter.progress("emulation", last + 1) as step:
        for index in residency.each(range(last + 1)):
            wanted = _wanted(removed, reads, index)
            # As long as the two streams are one, the dense one notes what attention puts out.
            noted: list[Taps] = taps if pruned is dense else [{} for _ in taps]
            for kind in KINDS:
                sublayer, run = Sublayer(index, kind), runs.get(index) if kind == "ffn" else None
                if pruned is dense and (sublayer in removed or run is not None):
                    pruned = dense.copy()
                seen = None
                if sublayer in removed and (not sequential or _sees_dense(removed[sublayer])):
                    seen = Seen(dense.copy(), [every[index] for every in arguments])
                advance(evaluator, sublayer, dense, arguments, taps=noted, wanted=wanted if noted is taps else {})
                if sublayer in removed:
                    inputs = pruned if sequential or seen is None else seen.streams
                    module = fit(
                        removed[sublayer],
                        Job(
                            evaluator, sublayer, inputs, dense, rank, taps, window, reads.get(sublayer, ()), seen,
                            noted, prepared.get(sublayer),
                        ),
                    )  # fmt: skip
                    emulations[sublayer], seen = module, None
                    del inputs  # may be all there is of a stream
                    if module is not None:
                        advance(evaluator, sublayer, pruned, arguments, module, taps=taps, wanted=wanted)
                elif run is not None:
                    goal = _ahead(evaluator, dense, arguments, range(index + 1, run + 1))
                    weights.update(compensate(evaluator, sublayer, pruned, goal, arguments, taps=taps, wanted=wanted))
                elif pruned is dense:
                    continue
                elif compensated:
                    weights.update(compensate(evaluator, sublayer, pruned, dense, arguments, taps=taps, wanted=wanted))
                else:
                    advance(evaluator, sublayer, pruned, arguments, taps=taps, wanted=wanted)
            forget_taps(taps, wanted)
            step.advance()
    if recalibrated:
        with residency.head():
            weights.update(recalibrate(evaluator, dense, pruned, reporter))
    return Recovery(emulations, weights)


def _runs(removed: Mapping[Sublayer, EmulationKind], num_blocks: int) -> dict[int, int]:
    """Block before a run of blocks that go as a whole, nothing in their place -> last block of the run."""
    whole = [all(removed.get(Sublayer(block, kind)) == "none" for kind in KINDS) for block in range(num_blocks)]
    runs: dict[int, int] = {}
    for block in range(num_blocks - 1):
        if not whole[block] and whole[block + 1]:
            end = block + 1
            while end + 1 < num_blocks and whole[end + 1]:
                end += 1
            runs[block] = end
    return runs


def _ahead(
    evaluator: Evaluator, streams: Batches, arguments: Sequence[Arguments], blocks: Sequence[int]
) -> Iterator[Tensor]:
    """The dense streams after some more blocks, [b, T, D] each, one batch after the other."""
    if not evaluator.residency.keeps_blocks:
        goal = streams.copy()  # all batches go through a block while it is there
        for block in evaluator.residency.each(blocks):
            for number, every in enumerate(arguments):
                goal[number] = evaluator.run_block(block, goal[number], every[block], {})
        yield from goal
        return
    for hidden, every in zip(streams, arguments, strict=True):
        for block in blocks:
            hidden = evaluator.run_block(block, hidden, every[block], {})
        yield hidden


def _wanted(
    removed: Mapping[Sublayer, EmulationKind], reads: Mapping[Sublayer, tuple[int, ...]], index: int
) -> dict[int, set[str]]:
    """What is read after block `index` of what attention puts out: block -> attributes of its tap."""
    wanted: dict[int, set[str]] = {}
    for sublayer, sources in reads.items():
        if sublayer.block > index:
            for source in sources:
                wanted.setdefault(source, set()).update(_noted(removed[sublayer]))
    return wanted


def _noted(kind: EmulationKind) -> frozenset[str]:
    """What an emulation with sources reads of their taps."""
    return frozenset() if kind == REMOVED else variant(kind).reads


def _sees_dense(kind: EmulationKind) -> bool:
    """Whether a fit asks for what the sublayer reads in the dense model."""
    return kind != REMOVED and variant(kind).sees_dense


def prepare(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, window: int, reporter: Reporter
) -> dict[Sublayer, Any]:
    """What each variant finds before the walk."""
    found: dict[Sublayer, Any] = {}
    for kind in sorted(set(removed.values()) - {REMOVED}):
        wanted = [sublayer for sublayer in sorted(removed) if removed[sublayer] == kind]
        found |= variant(kind).prepare(evaluator, wanted, removed.keys(), rank, window, reporter, enter)
    return found


def _walks(kind: EmulationKind) -> bool:
    """Whether a fit depends on what else is gone."""
    return kind != REMOVED and variant(kind).walks


def fit(kind: EmulationKind, job: Job) -> Emulation | None:
    """What takes the place of one sublayer; None for "none".

    Raises:
        NumberError: What was fitted is not finite.
    """
    module = None if kind == REMOVED else variant(kind).fit(job)
    if module is not None:
        check_tensors(module.named_parameters(), f"what was fitted for {job.sublayer}")
    return module


def sources_read(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], count: int
) -> dict[Sublayer, tuple[int, ...]]:
    """What every emulation reads that has sources."""
    return {s: _reads(evaluator, removed, s, kind, count) for s, kind in removed.items()}


def _reads(
    evaluator: Evaluator, gone: Collection[Sublayer], sublayer: Sublayer, kind: EmulationKind, count: int
) -> tuple[int, ...]:
    if kind == REMOVED:
        return ()
    types = getattr(evaluator.model.config, "layer_types", None)
    return variant(kind).sources(gone, sublayer, types, count)


def _kept_for(
    evaluator: Evaluator, gone: Collection[Sublayer], index: int, kind: EmulationKind, count: int
) -> dict[int, frozenset[str]]:
    """What blocks after `index` may read of what attention puts out: block -> attributes of its tap."""
    rest = [Sublayer(block, "attention") for block in range(index + 1, len(evaluator.blocks))]
    return {source: _noted(kind) for each in rest for source in _reads(evaluator, gone, each, kind, count)}


def fit_plan(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, reporter: Reporter, sources: int = 1,
    window: int = 0,
) -> dict[Sublayer, Emulation | None]:  # fmt: skip
    """The emulations alone, with every kept weight as it is; see `recover`."""
    found = recover(evaluator, removed, rank, reporter, compensated=False, sources=sources, window=window)
    return found.emulations


@torch.no_grad()
def fit_candidates(
    evaluator: Evaluator,
    base: Collection[Sublayer],
    candidates: Collection[Sublayer],
    kind: EmulationKind,
    rank: int,
    reporter: Reporter,
    sources: int = 1,
    window: int = 0,
) -> dict[Sublayer, Emulation]:
    """Fit what would emulate each candidate if it went next, and what emulates the sublayers that are gone.

    One pass over the model serves all candidates: each is fitted on the stream of the model with `base` emulated and
    itself still in place before it, as `recover` would fit it.
    """
    emulations: dict[Sublayer, Emulation] = {}
    wanted = {*base, *candidates}
    if not wanted or kind == REMOVED:
        return emulations
    dense, arguments = enter(evaluator)
    pruned = dense  # as long as nothing is gone
    taps: list[Taps] = [{} for _ in arguments]
    gone = dict.fromkeys(base, kind)
    last = last_block(evaluator, wanted, to_the_end=False)
    with reporter.progress("emulations of candidates", last + 1) as step:
        for index in evaluator.residency.each(range(last + 1)):
            kept = _kept_for(evaluator, gone, index, kind, sources)
            noted: list[Taps] = taps if pruned is dense else [{} for _ in taps]
            for sublayer in (Sublayer(index, kind_) for kind_ in KINDS):
                before = dense.copy() if sublayer in wanted and (pruned is dense or _sees_dense(kind)) else dense
                inputs = before if pruned is dense else pruned
                if sublayer in base:
                    pruned = inputs
                advance(evaluator, sublayer, dense, arguments, taps=noted, wanted=kept if noted is taps else {})
                module = None
                if sublayer in wanted:
                    reads = _reads(evaluator, gone, sublayer, kind, sources)
                    seen = Seen(before, [every[index] for every in arguments])
                    module = fit(kind, Job(evaluator, sublayer, inputs, dense, rank, taps, window, reads, seen))
                    del seen
                if module is not None:
                    emulations[sublayer] = module
                del before, inputs
                if pruned is not dense:
                    applied = module if sublayer in base else None
                    advance(evaluator, sublayer, pruned, arguments, applied, taps=taps, wanted=kept)
            forget_taps(taps, kept)
            step.advance()
    return emulations
