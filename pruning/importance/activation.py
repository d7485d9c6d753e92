"""Metrics read off the activations of one dense forward."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from pruning.plan import Sublayer
from pruning.subnetwork import Evaluator


@torch.inference_mode()
def cosine(
    evaluator: Evaluator, sublayers: Sequence[Sublayer], seed: int, advance: Callable[[], None]
) -> dict[Sublayer, float]:
    """1 - mean over tokens of cos(x, x + f(x)), x the residual stream before the sublayer.

    Source: ShortGPT's Block Influence, arXiv 2403.03853; on sublayers as in arXiv 2407.16286.
    """
    totals = dict.fromkeys(sublayers, 0.0)
    count = 0
    for batch in evaluator.batches:
        hidden, kwargs = evaluator.embed(batch)
        count += batch.numel()
        for index in range(len(evaluator.blocks)):
            middle = evaluator.run_block(index, hidden, kwargs[index], {"ffn": None})
            after = evaluator.run_block(index, middle, kwargs[index], {"attention": None})
            for sublayer, x, y in (
                (Sublayer(index, "attention"), hidden, middle),
                (Sublayer(index, "ffn"), middle, after),
            ):
                if sublayer in totals:
                    similarity = functional.cosine_similarity(x.float(), y.float(), dim=-1)
                    totals[sublayer] += float((1 - similarity).double().sum())
            hidden = after
        advance()
    return {sublayer: total / count for sublayer, total in totals.items()}
