"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.compensation import compensate, token_weights
from pruning.console import Reporter
from pruning.modeling import BiasEmulation, LowRankEmulation, rms_normalise
from pruning.plan import KINDS, EmulationKind, Sublayer
from pruning.regression import Affine, HeldOutMoments
from pruning.subnetwork import Evaluator


def as_module(affine: Affine, dtype: torch.dtype, device: torch.device) -> LowRankEmulation:
    """The map as a module of the checkpoint."""
    with torch.device("meta"):
        module = LowRankEmulation(affine.down.shape[0], affine.down.shape[1])
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
) -> Recovery:
    """Fit the emulation of every removed sublayer and, if asked, refit what is kept, first to last.

    Each fit sees the residual stream of the model as pruned and recovered so far and aims at the dense model's
    stream after the sublayer, so later fits also mend what earlier ones missed. The model keeps its own weights.
    """
    emulations: dict[Sublayer, nn.Module | None] = {}
    weights: dict[str, Tensor] = {}
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense = [hidden for hidden, _ in embedded]
    arguments = [kwargs for _, kwargs in embedded]
    pruned = list(dense)
    del embedded
    scale = evaluator.family.scale(evaluator.model.config)
    last = len(evaluator.blocks) - 1 if compensated else max(sublayer.block for sublayer in removed)
    with reporter.progress("emulation", last + 1) as step:
        for index in range(last + 1):
            kwargs = [every[index] for every in arguments]
            for kind in KINDS:
                sublayer = Sublayer(index, kind)
                dense = [evaluator.run_sublayer(sublayer, h, k) for h, k in zip(dense, kwargs, strict=True)]
                if sublayer in removed:
                    module = _fit(pruned, dense, removed[sublayer], rank, scale)
                    emulations[sublayer] = module
                    if module is not None:
                        calls = zip(pruned, kwargs, strict=True)
                        pruned = [evaluator.run_sublayer(sublayer, h, k, module) for h, k in calls]
                elif not emulations:
                    pruned = list(dense)
                elif compensated:
                    pruned, changed = compensate(evaluator, sublayer, pruned, dense, arguments)
                    weights |= changed
                else:
                    pruned = [evaluator.run_sublayer(sublayer, h, k) for h, k in zip(pruned, kwargs, strict=True)]
            step.advance()
    return Recovery(emulations, weights)


def fit_plan(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, reporter: Reporter
) -> dict[Sublayer, nn.Module | None]:
    """The emulations alone, with every kept weight as it is; see `recover`."""
    return recover(evaluator, removed, rank, reporter, compensated=False).emulations


@torch.no_grad()
def fit_candidates(
    evaluator: Evaluator,
    base: Collection[Sublayer],
    candidates: Collection[Sublayer],
    kind: EmulationKind,
    rank: int,
    reporter: Reporter,
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
    scale = evaluator.family.scale(evaluator.model.config)
    last = max(sublayer.block for sublayer in wanted)
    with reporter.progress("emulations of candidates", last + 1) as step:
        for index in range(last + 1):
            kwargs = [every[index] for every in arguments]
            for sublayer in (Sublayer(index, kind_) for kind_ in KINDS):
                dense = [evaluator.run_sublayer(sublayer, h, k) for h, k in zip(dense, kwargs, strict=True)]
                module = _fit(pruned, dense, kind, rank, scale) if sublayer in wanted else None
                if module is not None:
                    emulations[sublayer] = module
                applied = module if sublayer in base else None
                parted = parted or sublayer in base
                calls = zip(pruned, kwargs, strict=True)
                pruned = [evaluator.run_sublayer(sublayer, h, k, applied) for h, k in calls] if parted else dense
            step.advance()
    return emulations


def _fit(inputs: list[Tensor], targets: list[Tensor], kind: EmulationKind, rank: int, scale: float) -> nn.Module | None:
    """Fit one sublayer from its inputs and the dense stream after it, lists of [b, T, D]."""
    if kind == "none":
        return None
    size = inputs[0].shape[-1]
    moments = HeldOutMoments.zeros(size, size)
    for number, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        update = (target.float() - x.float()) / scale
        moments.add(number, rms_normalise(x).flatten(0, -2), update.flatten(0, -2), token_weights(target))
    dtype, device = inputs[0].dtype, inputs[0].device
    if kind == "bias":
        both = moments.whole()
        module = BiasEmulation(size)
        module.bias.data = (both.y_sum / both.weight).to(device, dtype)
        return module.requires_grad_(False)
    return as_module(moments.low_rank(rank), dtype, device)
