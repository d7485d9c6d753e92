"""Metrics that remove sublayers and watch the loss."""

from collections.abc import Callable, Sequence

from pruning.plan import Sublayer
from pruning.subnetwork import Evaluator


def leave_one_out(
    evaluator: Evaluator, sublayers: Sequence[Sublayer], seed: int, advance: Callable[[], None]
) -> dict[Sublayer, float]:
    """Loss without the sublayer minus loss of the dense model, nats/token.

    Source: arXiv 2407.16286, the leave-one-out case of the loss Shapley value.
    """
    dense, losses = evaluator.leave_one_out(sublayers, advance=advance)
    return {sublayer: float((loss - dense).mean()) for sublayer, loss in losses.items()}
