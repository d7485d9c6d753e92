"""Which tokens skip which FFNs, so that a given share of all FFN runs is spared: the least predicted cost first."""

from collections.abc import Mapping, Sequence

import torch

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.forward.sensitivity import sensitivities
from pruning.plan import Sublayer
from pruning.variants.skip_fit import GRADIENT_TOKENS, Predictor, Share, predictors


def predicted(
    evaluator: Evaluator, blocks: Sequence[int], rank: int, seed: int, reporter: Reporter
) -> dict[Sublayer, Predictor]:
    """What skipping costs each token, as the predictors of the FFNs in these blocks say.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        blocks: Whose FFNs may be skipped.
        rank: r of what tokens get instead.
        seed: Of the words that gradients are taken for.
        reporter: For progress.
    """
    family = evaluator.family
    outputs = {block: evaluator.blocks[block].get_submodule(f"{family.ffn}.{family.ffn_output}") for block in blocks}
    felt = sensitivities(evaluator, outputs, GRADIENT_TOKENS, seed, reporter)
    return predictors(evaluator, felt, rank, reporter)


def chosen(found: Mapping[Sublayer, Predictor], runs: int) -> dict[Sublayer, Share]:
    """How many calibration tokens skip each FFN, the least predicted cost first, over all FFNs and tokens.

    Args:
        found: From `predicted`.
        runs: FFN runs to spare, at most as many as may be.

    Returns:
        The FFNs that any token skips.
    """
    costs = torch.cat([each.costs for each in found.values()])
    owners = torch.cat([torch.full((len(each.costs),), number) for number, each in enumerate(found.values())])
    counts = owners[costs.argsort(stable=True)[:runs]].bincount(minlength=len(found)).tolist()
    return {
        sublayer: Share(each.weight, each.map, count)
        for (sublayer, each), count in zip(found.items(), counts, strict=True)
        if count
    }


def cost(found: Mapping[Sublayer, Predictor], runs: int) -> float:
    """Predicted cost of that, nats per token, each FFN alone."""
    costs = torch.cat([each.costs for each in found.values()])
    tokens = len(next(iter(found.values())).costs)
    return float(costs.sort().values[:runs].sum()) / tokens
