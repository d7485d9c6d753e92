"""Closed-form emulation: fit what a removed sublayer did, layer by layer, on the already-pruned prefix."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pruning.console import Reporter
from pruning.modeling import BiasEmulation, LowRankEmulation, rms_normalise
from pruning.plan import KINDS, EmulationKind, Kind, Sublayer
from pruning.regression import Affine, NormalEquations, fit_low_rank, fit_with_held_out
from pruning.subnetwork import Evaluator

HOLD_OUT_EVERY = 8


def as_module(affine: Affine, dtype: torch.dtype, device: torch.device) -> LowRankEmulation:
    """The map as a module of the checkpoint."""
    with torch.device("meta"):
        module = LowRankEmulation(affine.down.shape[0], affine.down.shape[1])
    tensors = {"down.weight": affine.down.T, "up.weight": affine.up.T, "up.bias": affine.bias}
    state = {name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


@torch.inference_mode()
def fit_plan(
    evaluator: Evaluator, removed: Mapping[Sublayer, EmulationKind], rank: int, reporter: Reporter
) -> dict[Sublayer, nn.Module | None]:
    """Fit the emulation of every removed sublayer, first to last.

    Each fit sees the residual stream of the model as pruned and recovered so far and aims at the dense model's
    stream after the sublayer, so later adapters also mend what earlier ones missed. Tokens count by the inverse
    square of their stream's size: the next norm divides by it, and a few massive activations would otherwise
    decide everything.

    Returns:
        Sublayer -> module, None where nothing emulates it.
    """
    fitted: dict[Sublayer, nn.Module | None] = {}
    embedded = [evaluator.embed(batch) for batch in evaluator.batches]
    dense = [hidden for hidden, _ in embedded]
    kwargs = [arguments for _, arguments in embedded]
    pruned = list(dense)
    last = max(sublayer.block for sublayer in removed)
    with reporter.progress("emulation", last + 1) as step:
        for index in range(last + 1):
            for kind in KINDS:
                sublayer = Sublayer(index, kind)
                other: dict[Kind, None] = {"ffn" if kind == "attention" else "attention": None}
                targets = [evaluator.run_block(index, h, kw[index], other) for h, kw in zip(dense, kwargs, strict=True)]
                if sublayer in removed:
                    module = _fit(pruned, targets, removed[sublayer], rank)
                    fitted[sublayer] = module
                    pruned = [h if module is None else h + module(h) for h in pruned]
                elif not fitted:
                    pruned = list(targets)
                else:
                    pruned = [
                        evaluator.run_block(index, h, kw[index], other) for h, kw in zip(pruned, kwargs, strict=True)
                    ]
                dense = targets
            step.advance()
    return fitted


def _fit(inputs: list[Tensor], targets: list[Tensor], kind: EmulationKind, rank: int) -> nn.Module | None:
    """Fit one sublayer from its inputs and the dense stream after it, lists of [b, T, D]."""
    if kind == "none":
        return None
    size = inputs[0].shape[-1]
    parts = (NormalEquations.zeros(size, size), NormalEquations.zeros(size, size))
    for number, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        update = (target - x).reshape(-1, size)
        weights = 1 / target.double().pow(2).mean(-1).reshape(-1)
        part = parts[int(number % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1)]
        part.add(rms_normalise(x).reshape(-1, size), update, weights)
    dtype, device = inputs[0].dtype, inputs[0].device
    if kind == "bias":
        both = parts[0].plus(parts[1])
        module = BiasEmulation(size)
        module.bias.data = (both.y_sum / both.weight).to(device, dtype)
        return module.requires_grad_(False)
    if parts[1].weight:
        affine, _ = fit_with_held_out(parts[0], parts[1], rank)
    else:
        affine = fit_low_rank(parts[0], rank, 1e-2)
    return as_module(affine, dtype, device)
