"""How much the next words feel an error in what an FFN puts out: second moments of a gradient there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruning.console import Reporter
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.regression import token_weights


def sensitivities(
    evaluator: Evaluator, projections: Mapping[int, nn.Module], tokens: int, seed: int, reporter: Reporter
) -> dict[int, Tensor]:
    """Second moments of the gradient of -log p(word) by what each block's projection puts out.

    The words are drawn from the model itself, so that half of e'Se is KL(dense || changed) to second order, e an error
    of the output whose direction does not depend on the token's gradient. Every token's gradient is multiplied by the
    root mean square of the stream after the block: errors are to be given over it, as everywhere here.

    Args:
        evaluator: Of the dense model, on the calibration tokens.
        projections: Block -> the output projection of its FFN.
        tokens: To take gradients on, at least one batch.
        seed: Of the words.
        reporter: For progress.

    Returns:
        Block -> S [D, D] float64, nats per token for unit errors at every token.

    Source: the Fisher information, as a product of a moment of gradients and one of inputs: K-FAC (arXiv 1503.05671).
    """
    head = Head(evaluator.model, evaluator.family)
    numbers = evaluator.batches[: max(1, tokens // max(1, evaluator.batches[0].numel()))]
    found: dict[int, Tensor] = {}
    generator = torch.Generator(evaluator.model.device).manual_seed(seed)
    with reporter.progress("gradients", len(numbers)) as step:
        for batch in numbers:
            for block, moment in _of_batch(evaluator, projections, head, batch, generator):
                found[block] = found[block] + moment if block in found else moment
            step.advance()
    total = sum(batch.numel() for batch in numbers)
    return {block: moment / total for block, moment in found.items()}


def _of_batch(
    evaluator: Evaluator, projections: Mapping[int, nn.Module], head: Head, batch: Tensor, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """Sums over one batch, the last block first; the graph of one block at a time is in memory."""
    hidden, arguments = evaluator.embed(batch)
    entering: list[Tensor] = []
    with torch.no_grad():
        for index in range(len(evaluator.blocks)):
            entering.append(hidden)
            hidden = evaluator.run_block(index, hidden, arguments[index], {})
        chosen = [torch.multinomial(head.logits(row[None]).softmax(-1), 1, generator=generator) for row in hidden]
        words = torch.cat(chosen).view(len(batch), -1)
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(head.cross_entropy(hidden, words).sum(), hidden)
    for index in reversed(range(len(evaluator.blocks))):
        before = entering.pop().detach().requires_grad_(True)
        with torch.enable_grad(), _put_out(projections.get(index)) as seen:
            after = evaluator.run_block(index, before, arguments[index], {})
            gradient, *own = torch.autograd.grad(after, (before, *seen), gradient)
        for each in own:
            rows = each.flatten(0, -2).float() / token_weights(after.detach()).to(each.device).float().sqrt()[:, None]
            yield index, (rows.T @ rows).double().cpu()


@contextmanager
def _put_out(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Record what a module puts out inside the `with`; nothing for none."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
