"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.forward.evaluator import Arguments, Evaluator, Taps
from pruning.forward.spill import Batches
from pruning.forward.walk import Seen, advance, enter, forget_taps, last_block
from pruning.models.modeling import BiasEmulation, ContextEmulation, LowRankEmulation, context_features
from pruning.plan import KINDS, EmulationKind, Sublayer, nearest_kept_attention
from pruning.recovery.compensation import compensate
from pruning.recovery.recalibration import recalibrate
from pruning.regression import Affine, HeldOutMoments, token_weights
from pruning.variants.kv_share_fit import KV_SHARE, cache_sources, fit_kv_share
from pruning.variants.shared_fit import differences, normalise_output


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
    dense, arguments = enter(evaluator)
    pruned = dense  # as long as nothing is gone
    taps: list[Taps] = [{} for _ in arguments]
    reads = sources_read(evaluator, removed, sources)
    shared = differences(evaluator, removed, rank, reporter)
    runs = _runs(removed, len(evaluator.blocks)) if compensated else {}
    last = last_block(evaluator, removed, to_the_end=compensated or recalibrated)
    with reporter.progress("emulation", last + 1) as step:
        for index in range(last + 1):
            wanted = _wanted(removed, reads, index)
            # As long as the two streams are one, the dense one notes what attention puts out.
            noted: list[Taps] = taps if pruned is dense else [{} for _ in taps]
            for kind in KINDS:
                sublayer, run = Sublayer(index, kind), runs.get(index) if kind == "ffn" else None
                if pruned is dense and (sublayer in removed or run is not None):
                    pruned = dense.copy()
                seen = None
                if sublayer in shared or removed.get(sublayer) in KV_SHARE or (sublayer in removed and not sequential):
                    seen = Seen(dense.copy(), [every[index] for every in arguments])
                advance(evaluator, sublayer, dense, arguments, taps=noted, wanted=wanted if noted is taps else {})
                if sublayer in removed:
                    inputs = pruned if sequential or seen is None else seen.streams
                    module: nn.Module | None
                    if emulation := shared.get(sublayer):
                        assert seen is not None
                        normalise_output(evaluator, sublayer, emulation, seen, noted, inputs, taps)
                        module = emulation
                    else:
                        module = fit(
                            evaluator, sublayer, inputs, dense, removed[sublayer], rank, taps, reads.get(sublayer, ()),
                            seen,
                        )  # fmt: skip
                    emulations[sublayer], seen = module, None
                    del inputs  # may be all there is of a stream
                    if module is not None:
                        advance(evaluator, sublayer, pruned, arguments, module, taps=taps, wanted=wanted)
                elif run is not None:
                    goal = _ahead(evaluator, dense, arguments, range(index + 1, run + 1))
                    weights |= compensate(evaluator, sublayer, pruned, goal, arguments, taps=taps, wanted=wanted)
                elif pruned is dense:
                    continue
                elif compensated:
                    weights |= compensate(evaluator, sublayer, pruned, dense, arguments, taps=taps, wanted=wanted)
                else:
                    advance(evaluator, sublayer, pruned, arguments, taps=taps, wanted=wanted)
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
    evaluator: Evaluator, streams: Batches, arguments: Sequence[Arguments], blocks: Sequence[int]
) -> Iterator[Tensor]:
    """The dense streams after some more blocks, [b, T, D] each, one batch after the other."""
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


def _noted(kind: EmulationKind) -> set[str]:
    """What an emulation with sources reads of their taps."""
    return {"keys", "values"} if kind in KV_SHARE else {"output"}


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
) -> dict[int, set[str]]:
    """What blocks after `index` may read of what attention puts out: block -> attributes of its tap."""
    rest = [Sublayer(block, "attention") for block in range(index + 1, len(evaluator.blocks))]
    return {source: _noted(kind) for each in rest for source in _reads(evaluator, gone, each, kind, count)}


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
    dense, arguments = enter(evaluator)
    pruned = dense  # as long as nothing is gone
    taps: list[Taps] = [{} for _ in arguments]
    gone = dict.fromkeys(base, kind)
    last = last_block(evaluator, wanted, to_the_end=False)
    with reporter.progress("emulations of candidates", last + 1) as step:
        for index in range(last + 1):
            kept = _kept_for(evaluator, gone, index, kind, sources)
            noted: list[Taps] = taps if pruned is dense else [{} for _ in taps]
            for sublayer in (Sublayer(index, kind_) for kind_ in KINDS):
                before = dense.copy() if sublayer in wanted and (pruned is dense or kind in KV_SHARE) else dense
                inputs = before if pruned is dense else pruned
                if sublayer in base:
                    pruned = inputs
                advance(evaluator, sublayer, dense, arguments, taps=noted, wanted=kept if noted is taps else {})
                module = None
                if sublayer in wanted:
                    reads = _reads(evaluator, gone, sublayer, kind, sources)
                    seen = Seen(before, [every[index] for every in arguments])
                    module = fit(evaluator, sublayer, inputs, dense, kind, rank, taps, reads, seen)
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


def fit(
    evaluator: Evaluator,
    sublayer: Sublayer,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    kind: EmulationKind,
    rank: int,
    taps: Sequence[Taps],
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
