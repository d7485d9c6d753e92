"""Which whole attention layers stay full, by ways that the product does not take by itself; for windows.py."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from peer_attention import laziest, lazy_ratios

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling
from pruning.models.loading import DenseModel
from pruning.plan import Sublayer, Unit
from pruning.search.selection import Judge, select
from pruning.variants.window_fit import limits
from pruning.windows.plans import Choice

ORDERS = ("spaced", "random", "one-forward", "lazy", "greedy", "evolutionary")
"""Layers evenly spaced; drawn; by what one forward says that each layer's limit changes; by LightTransfer's lazy ratio;
greedy and evolutionary search with windows in place, on a third of the text and one prompt, so that they end soon."""
SEARCHED_SHARE = 1 / 3
GENERATIONS = OFFSPRING = 8


def kept_layers(
    how: str, count: int, choice: Choice, judges: Sequence[Judge], dense: DenseModel, rows: torch.Tensor,
    reporter: Reporter,
) -> list[int]:  # fmt: skip
    """Blocks whose attention stays full, `count` of them.

    Args:
        how: One of `ORDERS`.
        count: Of blocks.
        choice: The product's, for its blocks and windows.
        judges: What plans are judged by.
        dense: The model.
        rows: Text to choose on, int64 [n, T].
        reporter: For progress.
    """
    blocks = choice.blocks
    window = next(iter(choice.limits.scored.values()))
    if how == "spaced":
        return sorted(blocks, key=lambda block: abs((block + 0.5) * count / len(blocks) % 1 - 0.5))[:count]
    if how == "random":
        return random.Random(0).sample(blocks, len(blocks))[:count]
    if how == "one-forward":
        evaluator = Evaluator(dense.model, dense.family, rows, 1)
        errors = limits(evaluator, [Sublayer(block, "attention") for block in blocks], window.size, reporter)
        return sorted(blocks, key=lambda block: -errors[Sublayer(block, "attention")].error)[:count]
    if how == "lazy":
        ratios = lazy_ratios(dense.model, dense.family, rows, window.size)
        lazy = laziest([ratios[block] for block in blocks], len(blocks) - count)
        return [block for place, block in enumerate(blocks) if place not in lazy]
    some = [replace(judge, evaluator=judge.evaluator.part(SEARCHED_SHARE)) for judge in judges]
    units = [Unit(block, "attention") for block in blocks]
    gone = select(
        some, [(units, len(units) - count)], "leave-one-out", how, Sampling(seed=0, samples=1, depth=10), reporter,
        generations=GENERATIONS, offspring=OFFSPRING,
    ).order  # fmt: skip
    return [block for block in blocks if Unit(block, "attention") not in gone]
