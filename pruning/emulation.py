"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.compensation import compensate, token_weights
from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.kv_sharing import KV_SHARE, Seen, cache_sources, fit_kv_share
from pruning.modeling import BiasEmulation, ContextEmulation, LowRankEmulation, context_features
from pruning.plan import KINDS, EmulationKind, Sublayer, nearest_kept_attention
from pruning.recalibration import recalibrate
from pruning.regression import Affine, HeldOutMoments
from pruning.subnetwork import Arguments, Evaluator, Taps


def as_module(affine: Affine, sources: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The map as a module of the checkpoint; it reads these blocks' attention beside the stream."""
    size, rank = affine.up.shape[1], affine.down.shape[1]
    with torch.device("meta"):
        module = ContextEmulation(size, rank, sources) if sources else LowRankEmulation(size, rank)
    tensors = {"down.weight": affine.down.T, "up.weight": affine.up.T, "up.bias": affine.bias}
    state = {name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What makes up for the removed sublayers.

    Attributes:
        emulations: Sublayer -> module, None where nothing emulates it.
        weights: Parameter name in the dense model -> compensated weight.
    """

    emulations: dict[Sublayer, nn.Module | None]
    weights: dict[str, Tensor]


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
        recalibrated: In the end also scale the final norm.
    """
    emulations: dict[Sublayer, nn.Module | None] = {}
    weights: dict[str, Tensor] = {}
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense = [hidden for hidden, _ in embedded]
    arguments = [kwargs for _, kwargs in embedded]
    pruned = list(dense)
    taps: list[Taps] = [{} for _ in dense]
    del embedded
    reads = sources_read(evaluator, removed, sources)
    wanted = {source for read in reads.values() for source in read}
    runs = _runs(removed, len(evaluator.blocks)) if compensated else {}
    to_the_end = compensated or recalibrated
    last = len(evaluator.blocks) - 1 if to_the_end else max(sublayer.block for sublayer in removed)
    with reporter.progress("emulation", last + 1) as step:
        for index in range(last + 1):
            kwargs = [every[index] for every in arguments]
            # As long as nothing is gone the two streams are one, and the dense one notes what attention puts out.
            noted: list[Taps] = [{} for _ in taps] if emulations else taps
            for kind in KINDS:
                sublayer = Sublayer(index, kind)
                before = dense
                calls = zip(dense, kwargs, noted, strict=True)
                dense = [evaluator.run_and_tap(sublayer, h, k, None, t) for h, k, t in calls]
                if sublayer in removed:
                    inputs = pruned if sequential else before
                    module = fit(
                        evaluator, sublayer, inputs, dense, removed[sublayer], rank, taps, reads.get(sublayer, ()),
                        Seen(before, kwargs),
                    )  # fmt: skip
                    emulations[sublayer] = module
                    if module is not None:
                        calls = zip(pruned, kwargs, taps, strict=True)
                        pruned = [evaluator.run_and_tap(sublayer, h, k, module, t) for h, k, t in calls]
                elif kind == "ffn" and index in runs:
                    goal = _ahead(evaluator, dense, arguments, range(index + 1, runs[index] + 1))
                    pruned, changed = compensate(evaluator, sublayer, pruned, goal, arguments, taps)
                    weights |= changed
                elif not emulations:
                    pruned = list(dense)
                elif compensated:
                    pruned, changed = compensate(evaluator, sublayer, pruned, dense, arguments, taps)
                    weights |= changed
                else:
                    calls = zip(pruned, kwargs, taps, strict=True)
                    pruned = [evaluator.run_and_tap(sublayer, h, k, None, t) for h, k, t in calls]
            forget_taps(taps, wanted)
            step.advance()
    if recalibrated:
        weights |= recalibrate(evaluator, dense, pruned, reporter)
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
    evaluator: Evaluator, streams: list[Tensor], arguments: list[Arguments], blocks: Iterable[int]
) -> list[Tensor]:
    """The dense streams after some more blocks, batches of [b, T, D]."""
    for block in blocks:
        calls = zip(streams, arguments, strict=True)
        streams = [evaluator.run_block(block, hidden, every[block], {}) for hidden, every in calls]
    return streams


def sources_read(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], count: int
) -> dict[Sublayer, tuple[int, ...]]:
    """What every emulation reads that has sources."""
    return {s: _reads(evaluator, removed, s, kind, count) for s, kind in removed.items()}


def _reads(
    evaluator: Evaluator, gone: Collection[Sublayer], sublayer: Sublayer, kind: EmulationKind, count: int
) -> tuple[int, ...]:
    if kind == "context":
        return nearest_kept_attention(gone, sublayer.block, count)
    return cache_sources(evaluator, gone, sublayer) if kind in KV_SHARE else ()


def _kept_for(
    evaluator: Evaluator, gone: Collection[Sublayer], index: int, kind: EmulationKind, count: int
) -> set[int]:
    """What later blocks may read when block `index` is done."""
    rest = [Sublayer(block, "attention") for block in range(index + 1, len(evaluator.blocks))]
    return {source for each in rest for source in _reads(evaluator, gone, each, kind, count)}


def forget_taps(taps: list[Taps], wanted: Collection[int]) -> None:
    """Drop what attention put out in blocks that nothing reads any more."""
    for each in taps:
        for block in set(each) - set(wanted):
            del each[block]


def fit_plan(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, reporter: Reporter, sources: int = 1
) -> dict[Sublayer, nn.Module | None]:
    """The emulations alone, with every kept weight as it is; see `recover`."""
    return recover(evaluator, removed, rank, reporter, compensated=False, sources=sources).emulations


@torch.no_grad()
def fit_candidates(
    evaluator: Evaluator,
    base: Collection[Sublayer],
    candidates: Collection[Sublayer],
    kind: EmulationKind,
    rank: int,
    reporter: Reporter,
    sources: int = 1,
) -> dict[Sublayer, nn.Module]:
    """Fit what would emulate each candidate if it went next, and what emulates the sublayers that are gone.

    One pass over the model serves all candidates: each is fitted on the stream of the model with `base` emulated and
    itself still in place before it, as `recover` would fit it.
    """
    emulations: dict[Sublayer, nn.Module] = {}
    wanted = {*base, *candidates}
    if not wanted or kind == "none":
        return emulations
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense, arguments = [hidden for hidden, _ in embedded], [kwargs for _, kwargs in embedded]
    pruned, parted = dense, False
    taps: list[Taps] = [{} for _ in dense]
    gone = dict.fromkeys(base, kind)
    last = max(sublayer.block for sublayer in wanted)
    with reporter.progress("emulations of candidates", last + 1) as step:
        for index in range(last + 1):
            kwargs = [every[index] for every in arguments]
            noted: list[Taps] = [{} for _ in taps] if parted else taps
            for sublayer in (Sublayer(index, kind_) for kind_ in KINDS):
                calls = zip(dense, kwargs, noted, strict=True)
                before, dense = dense, [evaluator.run_and_tap(sublayer, h, k, None, t) for h, k, t in calls]
                module = None
                if sublayer in wanted:
                    reads = _reads(evaluator, gone, sublayer, kind, sources)
                    module = fit(evaluator, sublayer, pruned, dense, kind, rank, taps, reads, Seen(before, kwargs))
                if module is not None:
                    emulations[sublayer] = module
                applied = module if sublayer in base else None
                parted = parted or sublayer in base
                calls = zip(pruned, kwargs, taps, strict=True)
                pruned = [evaluator.run_and_tap(sublayer, h, k, applied, t) for h, k, t in calls] if parted else dense
            forget_taps(taps, _kept_for(evaluator, gone, index, kind, sources))
            step.advance()
    return emulations


def fit(
    evaluator: Evaluator,
    sublayer: Sublayer,
    inputs: list[Tensor],
    targets: list[Tensor],
    kind: EmulationKind,
    rank: int,
    taps: list[Taps],
    sources: tuple[int, ...],
    seen: Seen | None = None,
) -> nn.Module | None:
    """Fit what emulates one sublayer.

    Args:
        evaluator: Of the dense model.
        sublayer: Removed.
        inputs: The stream before it, batches of [b, T, D].
        targets: The dense stream after it, the same.
        kind: Of emulation; "none" gives None.
        rank: r.
        taps: What attention layers before it put out, for each batch.
        sources: Which of them it reads.
        seen: What the sublayer itself read in the dense model; `kv_share` asks for it.
    """
    if kind == "none":
        return None
    if kind in KV_SHARE and sources:
        assert seen is not None
        return fit_kv_share(evaluator, sublayer, sources[0], seen, inputs, targets, taps, rank, full=kind == "kv_share")
    dtype, device = inputs[0].dtype, inputs[0].device
    if kind == "self_only":
        return as_module(self_only(evaluator, sublayer), (), dtype, device)
    size = inputs[0].shape[-1]
    scale = evaluator.family.scale(evaluator.model.config)
    moments = HeldOutMoments.zeros(size * (1 + len(sources)), size)
    first = 0
    for x, target, each in zip(inputs, targets, taps, strict=True):
        update = (target.float() - x.float()) / scale
        features = context_features(evaluator.reads(sublayer, x, each), [each[source].output for source in sources])
        moments.add_windows(first, features, update, token_weights(target).view(target.shape[:-1]))
        first += len(target)
    if kind == "bias":
        both = moments.whole()
        module = BiasEmulation(size)
        module.bias.data = (both.y_sum / both.weight).to(device, dtype)
        return module.requires_grad_(False)
    return as_module(moments.low_rank(size if kind == "linear" else rank), sources, dtype, device)


def self_only(evaluator: Evaluator, sublayer: Sublayer) -> Affine:
    """Attention of every token to itself alone, W_o W_v of the normed input: an emulation that needs no data.

    The map is probed with windows of one token, where it is what attention does, so grouped heads, fused projections
    and biases need no cases of their own. Its rank is at most K heads · head dim. Exact under an RMSNorm; under a
    LayerNorm the standard deviation is taken for the root mean square.

    Raises:
        RecipeError: An FFN, or a family with a norm after attention or one for both sublayers: there is no such map.

    Source: inferred; an attention pattern that is the identity matrix.
    """
    family = evaluator.family
    before, after = family.norms(sublayer.kind)
    if sublayer.kind != "attention" or before is None or after is not None:
        raise RecipeError(f"{sublayer} cannot be emulated by self-only: it needs attention with a norm only before it")
    block = evaluator.blocks[sublayer.block]
    attention, norm = getattr(block, family.attention), getattr(block, before)
    size = evaluator.model.config.hidden_size
    token = evaluator.batches[0][:1, :1]
    _, arguments = evaluator.embed(token)
    place = {"dtype": evaluator.model.dtype, "device": evaluator.model.device}
    sign = torch.ones(size, **place)
    sign[1::2] = -1
    plus, minus = norm(sign[None])[0], norm(-sign[None])[0]
    gain, shift = (plus - minus) / 2 * sign, (plus + minus) / 2
    probes = torch.cat([torch.eye(size, **place), shift[None], torch.zeros(1, size, **place)])[:, None]
    out = attention(hidden_states=probes, **arguments[sublayer.block])[0][:, 0].double().cpu()
    zero = out[-1]
    matrix = gain.double().cpu()[:, None] * (out[:size] - zero)
    if float((norm(torch.ones(1, size, **place))[0] - shift).abs().max()) < 1e-4 * float(gain.abs().max()):
        matrix = matrix - matrix.mean(0)  # a LayerNorm takes the mean away
    left, values, right = torch.linalg.svd(matrix)
    rank = max(1, int((values > 1e-5 * values[0]).sum()))
    return Affine(left[:, :rank] * values[:rank], right[:rank], out[-2])
