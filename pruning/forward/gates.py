"""Gradients of the loss by gates between a sublayer and what takes its place, or between a KV head and its limit."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pruning.errors import RecipeError
from pruning.forward.blocks import Taps
from pruning.forward.evaluator import Evaluator
from pruning.forward.spill import batches
from pruning.plan import KINDS, Sublayer

Run = Callable[[Evaluator, int, Tensor, Mapping[str, Any], Tensor, Taps], Tensor]
"""(evaluator, block, stream [b, T, D], the block's arguments, its gates [b, n], taps) -> the stream after the block."""


def sublayer_gradients(evaluator: Evaluator, gates: Tensor, number: int) -> Tensor:
    """Gradient of the loss by a gate on every sublayer's update: x + g f(x).

    Where the view has an emulation for a sublayer, the gate goes from that (0) to the sublayer itself (1).

    Args:
        evaluator: A view of a subnetwork.
        gates: float32 [L, 2], attention and ffn.
        number: Of the batch.

    Returns:
        d(mean loss of the window)/d gate, float64 [b, L, 2], nats/token; 0 for what the view removes.
    """
    return _gradients(evaluator, gates, [number], with_sublayer_gates)[0]


def each_sublayer_gradients(evaluator: Evaluator, gates: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`sublayer_gradients` of each batch that this process computes, by its number; blocks from disk are read once."""
    return _each(evaluator, gates, with_sublayer_gates)


def head_gradients(evaluator: Evaluator, gates: Tensor, number: int) -> Tensor:
    """Gradient of the loss by gates on every KV head, the weights of what it may be: full, or a window.

    Args:
        evaluator: A view whose emulations have gates for heads.
        gates: float32 [L, K, S]; of full attention first, then of each window that the emulations have gates for.
        number: Of the batch.

    Returns:
        d(mean loss of the window)/d gate, float64 [b, L, K, S], nats/token; 0 where there is no emulation.
    """
    return _gradients(evaluator, gates.flatten(1), [number], with_head_gates)[0].unflatten(2, gates.shape[1:])


def each_head_gradients(evaluator: Evaluator, gates: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`head_gradients` of each batch that this process computes, by its number; blocks from disk are read once."""
    for number, found in _each(evaluator, gates.flatten(1), with_head_gates):
        yield number, found.unflatten(2, gates.shape[1:])


def _each(evaluator: Evaluator, gates: Tensor, run: Run) -> Iterator[tuple[int, Tensor]]:
    for numbers in evaluator.rounds():
        yield from zip(numbers, _gradients(evaluator, gates, numbers, run), strict=True)


def _gradients(evaluator: Evaluator, gates: Tensor, numbers: list[int], run: Run) -> list[Tensor]:
    """Gradients of each window's loss by its own gates [L, n], float64 [b, L, n] of each batch.

    One gate for each window, so that one backward pass gives every window's own gradient.
    """
    whole = bool(evaluator.sources([evaluator.complete({}), evaluator.emulations]))
    found = (_at_once if whole else _block_by_block)(evaluator, numbers, run, gates)
    return [each.double().cpu() for each in found]


def _wide(gates: Tensor, hidden: Tensor) -> Tensor:
    """The gates of each row of a stream [b, T, D], [b, L, n]."""
    return gates.to(hidden.device, hidden.dtype).repeat(len(hidden), 1, 1)


def _block_by_block(evaluator: Evaluator, numbers: list[int], run: Run, gates: Tensor) -> list[Tensor]:
    """Gradients by gates [b, L, n] with one block and the graph of one block at a time in memory.

    `checkpoint` would hold what each block saves for gradients by its weights, which nobody asks for, until the end.
    What enters each block is kept, in a file where it is much.
    """
    embedded = evaluator.embedded(numbers)
    streams = [embedded[number][0] for number in numbers]
    arguments = [embedded[number][1] for number in numbers]
    del embedded
    wide = [_wide(gates, hidden) for hidden in streams]
    entering = batches(sum(hidden.nbytes for hidden in streams) * len(evaluator.blocks))
    with torch.no_grad():
        for index in range(len(evaluator.blocks)):
            with evaluator.residency.block(index):
                for at, hidden in enumerate(streams):
                    entering.append(hidden)
                    streams[at] = run(evaluator, index, hidden, arguments[at][index], wide[at][:, index], {})
    out = [torch.zeros_like(each) for each in wide]
    with torch.enable_grad():
        with evaluator.residency.head():
            for at, number in enumerate(numbers):
                hidden = streams[at].detach().requires_grad_(True)
                (streams[at],) = torch.autograd.grad(evaluator.window_loss(hidden, number).sum(), hidden)
        for index in reversed(range(len(evaluator.blocks))):
            with evaluator.residency.block(index):
                for at in reversed(range(len(numbers))):
                    before = entering.pop().detach().requires_grad_(True)
                    own = wide[at][:, index].detach().requires_grad_(True)
                    after = run(evaluator, index, before, arguments[at][index], own, {})
                    found = torch.autograd.grad(
                        after, (before, own), streams[at], allow_unused=True, materialize_grads=True
                    )
                    streams[at], out[at][:, index] = found
                    del after, before
    return out


def _at_once(evaluator: Evaluator, numbers: list[int], run: Run, gates: Tensor) -> list[Tensor]:
    """The same where emulations read what earlier blocks put out, so that gradients skip blocks; all blocks are here.

    Raises:
        RecipeError: They come from disk.
    """
    if not evaluator.residency.keeps_blocks:
        raise RecipeError(
            "gradients through emulations that read other layers need the whole model; leave --stream out"
        )
    return [_whole(evaluator, number, run, gates) for number in numbers]


def _whole(evaluator: Evaluator, number: int, run: Run, gates: Tensor) -> Tensor:
    hidden, kwargs = evaluator.embed(evaluator.batches[number])
    taps: Taps = {}
    wide = _wide(gates, hidden).requires_grad_(True)
    with torch.enable_grad():
        for index in range(len(evaluator.blocks)):
            given = evaluator, index, hidden, kwargs[index], wide[:, index], taps
            hidden = checkpoint(run, *given, use_reentrant=False)
        (gradient,) = torch.autograd.grad(evaluator.window_loss(hidden, number).sum(), wide)
    taps.clear()  # the graph holds them and they hold the graph, where no collector sees it
    return gradient


def with_head_gates(
    evaluator: Evaluator, index: int, hidden: Tensor, kwargs: Mapping[str, Any], gates: Tensor, taps: Taps
) -> Tensor:
    """One block [b, T, D] -> [b, T, D] with gates on every KV head, [b, K S]."""
    base = evaluator.complete({})
    for kind in KINDS:
        sublayer = Sublayer(index, kind)
        emulation: Any = base[sublayer] if sublayer in base else evaluator.emulations.get(sublayer)
        if sublayer in base and emulation is None:
            continue
        if sublayer not in base and emulation is not None:
            emulation = emulation.gated(gates)
        hidden = evaluator.run_and_tap(sublayer, hidden, kwargs, emulation, taps)
    return hidden


def with_sublayer_gates(
    evaluator: Evaluator, index: int, hidden: Tensor, kwargs: Mapping[str, Any], gates: Tensor, taps: Taps
) -> Tensor:
    """One block [b, T, D] -> [b, T, D] with a gate on each of its sublayers, [b, 2]."""
    base = evaluator.complete({})
    for column, kind in enumerate(KINDS):
        sublayer = Sublayer(index, kind)
        if sublayer in base:
            emulation = base[sublayer]
            if emulation is not None:
                hidden = evaluator.run_and_tap(sublayer, hidden, kwargs, emulation, taps)
            continue
        other = hidden
        if (emulation := evaluator.emulations.get(sublayer)) is not None:
            other = evaluator.run_and_tap(sublayer, hidden, kwargs, emulation, dict(taps))
        after = evaluator.run_and_tap(sublayer, hidden, kwargs, None, taps)
        hidden = other + gates[:, column, None, None] * (after - other)
    return hidden
