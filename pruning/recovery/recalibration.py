"""Recalibration: scale the final norm until a pruned model is as sure of its next words as the dense one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.forward.spill import batches
from pruning.regression import held_out

TOKENS = 4096  # at least, and at least one in `SHARE` of those fitted on
SHARE = 8
ITERATIONS = 10
EVALUATIONS = 12  # at most
CHUNK_TOKENS = 512  # whose logits are whole at a time


@torch.no_grad()
def recalibrate(
    evaluator: Evaluator, dense: Sequence[Tensor], pruned: Sequence[Tensor], reporter: Reporter
) -> dict[str, Tensor]:
    """Scale every feature of the final norm so that the next-token distributions come nearest to the dense model's.

    What is left of a pruned model is too sure of itself, most of all on text unlike that it was fitted on. Minimises
    KL(dense || pruned), convex in the scale as the logits are linear in it, by L-BFGS; nothing goes back through
    the blocks. Taken where the divergence falls on held-out windows. Costs no parameter and no operation.

    Args:
        evaluator: Of the dense model, which keeps its own weights.
        dense: What leaves its last block, batches of [b, T, D].
        pruned: What leaves the last block of the model as pruned and recovered, the same.
        reporter: For progress.

    Returns:
        Parameter name -> new tensor of the final norm; empty where the old one stays, and for models with a soft cap on
        their logits, of which the divergence is not convex.

    Source: temperature scaling (Guo et al., arXiv 1706.04599) with a temperature for every feature and the dense
        model's distribution in place of labels; inferred.
    """
    head = Head(evaluator.model, evaluator.family)
    if head.cap is not None:
        return {}
    fitting, judging = _split(head, dense, pruned)
    if not judging.positions:
        return {}
    start = torch.ones(dense[0].shape[-1], device=dense[0].device)
    with reporter.progress("recalibration", EVALUATIONS) as step:
        scale = _least(fitting, start, step.advance)
    if not judging(scale)[0] < judging(start)[0]:
        return {}
    return {f"{evaluator.family.norm}.{name}": new for name, new in _scaled(head.norm, scale).items()}


class _Divergence:
    """KL(dense || pruned) less a constant, mean over positions, by the scale s [D] of the pruned model's normed states.

    With x a normed state, W the output projection and m = sum_v p_v W_v, p the dense distribution there:
    log sum_v exp(W_v·(s x)) - m·(s x). Logits exist for one chunk at a time.

    Args:
        head: Of the dense model.
        positions: How many will be added, to hold what fits in memory there.
    """

    def __init__(self, head: Head, positions: int = 0) -> None:
        self.head = head
        self.weight = head.projection.get_parameter("weight")
        each = positions * self.weight.shape[-1] * 4
        self.ours, self.expected = batches(each, copies=2), batches(each, copies=2)
        self.positions = 0

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        """Add a window: final states [T, D] of both models."""
        for theirs, ours in zip(dense.split(CHUNK_TOKENS), pruned.split(CHUNK_TOKENS), strict=True):
            self.expected.append(self._back(torch.softmax(self._logits(self.head.norm(theirs)), -1)))
            self.ours.append(self.head.norm(ours))
            self.positions += len(ours)

    @torch.no_grad()
    def __call__(self, scale: Tensor) -> tuple[float, Tensor]:
        """The divergence in nats/token, and its gradient float32 [D]."""
        total, gradient = 0.0, torch.zeros_like(scale)
        for rows, expected in zip(self.ours, self.expected, strict=True):
            wide = rows.float()
            logits = self._logits((wide * scale).to(rows.dtype))
            log_sum = torch.logsumexp(logits, -1, keepdim=True)
            total += float(log_sum.double().sum() - ((wide * scale) * expected).double().sum())
            gradient += ((self._back((logits - log_sum).exp_()) - expected) * wide).sum(0)
        return total / self.positions, gradient / self.positions

    def _logits(self, rows: Tensor) -> Tensor:
        return self.head.projection(rows).float() / self.head.scaling

    def _back(self, distribution: Tensor) -> Tensor:
        """Mean output embedding under a distribution [n, V], float32 [n, D], as the logits' gradient has it."""
        return (distribution.to(self.weight.dtype) @ self.weight).float() / self.head.scaling


def _split(head: Head, dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> tuple[_Divergence, _Divergence]:
    """Divergence of the windows to fit on, and of one in five that is held out."""
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in dense)
    wanted = min(tokens, max(TOKENS, tokens // SHARE))
    fitting, judging = _Divergence(head, wanted), _Divergence(head, wanted)
    pairs = (pair for batches in zip(dense, pruned, strict=True) for pair in zip(*batches, strict=True))
    for number, (theirs, ours) in enumerate(pairs):
        if fitting.positions + judging.positions >= wanted:
            break
        (judging if held_out(number, 1) else fitting).add(theirs[:-1], ours[:-1])
    return fitting, judging


def _least(function: _Divergence, start: Tensor, advance: Callable[[], None]) -> Tensor:
    """Where a convex function is least, [D]."""
    scale = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([scale], max_iter=ITERATIONS, max_eval=EVALUATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        value, scale.grad = function(scale.detach())
        advance()
        return value

    optimizer.step(closure)
    return scale.detach()


def _scaled(norm: nn.Module, scale: Tensor) -> dict[str, Tensor]:
    """Parameters with which a norm gives `scale` times what it gives; none where there are no such parameters.

    Some families multiply by 1 + weight, so the answer is tried.
    """
    old = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    probe = torch.linspace(-2, 2, len(scale), device=scale.device).sin()[None]
    expected = functional_call(norm, {name: one.float() for name, one in old.items()}, (probe,)) * scale
    for offset in (0.0, 1.0):
        new = {
            n: one.float() * scale if n != "weight" else (one.float() + offset) * scale - offset
            for n, one in old.items()
        }
        if torch.allclose(functional_call(norm, new, (probe,)), expected, atol=1e-4, rtol=1e-4):
            return {name: tensor.to(old[name].dtype) for name, tensor in new.items()}
    return {}
