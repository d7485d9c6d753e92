"""What each layer's limit changes, with which sink, from one forward of the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families import head_dim
from pruning.plan import KINDS, Sublayer
from pruning.variants.taps import Tap
from pruning.variants.window import Window

if TYPE_CHECKING:
    from pruning.console import Reporter
    from pruning.forward.blocks import Taps
    from pruning.forward.evaluator import Evaluator

FIRST_TOKENS = 8  # whose keys and values are averaged
LEAST_WINDOWS = 4  # that a row has to hold, or the sink is chosen with a smaller window


@dataclass(frozen=True, slots=True)
class Limit:
    """One layer limited.

    Attributes:
        window: The module.
        error: Mean over tokens of |limited - full update|^2 / |stream|^2.
        errors: Candidate ("none", "bos", "mean") -> the same.
    """

    window: Window
    error: float
    errors: Mapping[str, float]


def limits(
    evaluator: "Evaluator", wanted: Sequence[Sublayer], size: int, reporter: "Reporter"
) -> dict[Sublayer, Limit]:
    """Limit each attention layer by itself and keep the sink, or none, that changes its update least.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        wanted: Attention sublayers.
        size: Positions of the window. Rows shorter than four windows choose the sink with a window of a quarter row.
        reporter: For progress.

    Source: inferred. The sink's constants are what the model caches of a first token: of the one that the model starts
        texts with, or the mean over the first tokens of several texts.
    """
    candidates = first_tokens(evaluator)
    found: dict[Sublayer, Limit] = {}
    sums: dict[Sublayer, dict[str, list[float]]] = {sublayer: {} for sublayer in wanted}
    last = max((sublayer.block for sublayer in wanted), default=-1)
    trial = min(size, max(2, min(batch.shape[1] for batch in evaluator.batches) // LEAST_WINDOWS))
    read = evaluator.sources([])
    with torch.no_grad(), reporter.progress("limits", len(evaluator.batches) * (last + 1)) as step:
        for together in evaluator.rounds(list(range(len(evaluator.batches)))):
            streams = evaluator.embedded(together)
            taps: dict[int, Taps] = {number: {} for number in together}
            for index in range(last + 1):
                with evaluator.residency.block(index):
                    for number, (hidden, arguments) in streams.items():
                        for kind in KINDS:
                            sublayer = Sublayer(index, kind)
                            after = evaluator.run_and_tap(sublayer, hidden, arguments[index], None, taps[number])
                            if sublayer in sums:
                                for name, sink in candidates[index].items():
                                    window = made(evaluator, trial, sink)
                                    limited = evaluator.run_sublayer(sublayer, hidden, arguments[index], window)
                                    _add(sums[sublayer].setdefault(name, [0.0, 0.0]), hidden, after, limited)
                            hidden = after
                        streams[number] = hidden, arguments
                        if not read:
                            taps[number].clear()
                        step.advance()
    for sublayer, each in sums.items():
        errors = {name: total / count for name, (total, count) in each.items()}
        best = min(errors, key=lambda name: errors[name])
        found[sublayer] = Limit(made(evaluator, size, candidates[sublayer.block][best]), errors[best], errors)
    return found


def _add(sums: list[float], before: Tensor, full: Tensor, limited: Tensor) -> None:
    change = (limited.float() - full.float()).square().sum(-1) / before.float().square().sum(-1)
    sums[0] += float(change.double().sum())
    sums[1] += change.numel()


def resized(window: Window, size: int) -> Window:
    """A window of another size with the same sink."""
    other = Window(size, window.kv_heads, 1, False, window.full)
    other.sink = window.sink
    for name, parameter in window.named_parameters():
        other.register_parameter(name, parameter)
    return other


def made(evaluator: "Evaluator", size: int, sink: tuple[Tensor, Tensor] | None) -> Window:
    """A window with these constants, [K, d] each, or without a sink."""
    config = evaluator.model.config
    with torch.device("meta"):
        window = Window(size, int(config.num_key_value_heads), head_dim(config), sink is not None)
    if sink is not None:
        place = {"device": sink[0].device, "dtype": evaluator.model.dtype}
        state = {"sink_key": sink[0].to(**place), "sink_value": sink[1].to(**place)}
        window.load_state_dict(state, assign=True)
    window.requires_grad_(False)
    return window


def first_tokens(evaluator: "Evaluator") -> list[dict[str, tuple[Tensor, Tensor] | None]]:
    """For each block, the constants that may be planted: none, those of the model's own first token, and a mean.

    Returns:
        Candidate -> (key after rotation, value), [K, d] each.
    """
    config = evaluator.model.config
    ordinary = torch.cat([batch[:, 0] for batch in evaluator.batches]).unique()[:FIRST_TOKENS]
    bos = config.bos_token_id if isinstance(config.bos_token_id, int) else None
    tokens = torch.cat([ordinary, torch.tensor([] if bos is None else [bos], dtype=ordinary.dtype)])
    found: list[dict[str, tuple[Tensor, Tensor] | None]] = []
    with torch.no_grad():
        with evaluator.residency.embedding():
            hidden, arguments = evaluator.embed(tokens[:, None])
        for index, block in enumerate(evaluator.blocks):
            tap = Tap()
            with evaluator.residency.block(index):
                attention = getattr(block, evaluator.family.attention)
                handle = attention.register_forward_pre_hook(tap.record, with_kwargs=True)
                try:
                    hidden = evaluator.run_block(index, hidden, arguments[index], {})
                finally:
                    handle.remove()
            each: dict[str, tuple[Tensor, Tensor] | None] = {"none": None}
            if tap.keys is not None and tap.values is not None:
                keys, values = tap.keys[:, :, 0], tap.values[:, :, 0]
                count = len(ordinary)
                each["mean"] = keys[:count].mean(0), values[:count].mean(0)
                if bos is not None:
                    each["bos"] = keys[count].clone(), values[count].clone()
            found.append(each)
    return found
