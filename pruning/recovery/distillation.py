"""A pruned model beside the dense one it came from: what both compute, and how far they are apart."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import Family
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Head
from pruning.models.modeling import blocks_of
from pruning.models.surgery import apply_plan
from pruning.plan import Plan, Sublayer

Loss = Literal["kl", "next-token", "hidden"]


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own structure whose parameters and buffers lie in the same memory as the given one's."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def cut_copy(
    model: PreTrainedModel,
    family: Family,
    plan: Plan,
    emulations: Mapping[Sublayer, nn.Module | None],
    weights: Mapping[str, Tensor],
) -> PreTrainedModel:
    """The pruned model, in the memory of the dense one wherever both are the same.

    Args:
        model: Dense model, left as it is.
        family: Where its parts are.
        plan: What is gone.
        emulations: What takes its place; these very modules become parts of it, their sources renumbered.
        weights: Parameter name in the dense model -> weight of the pruned one.
    """
    made = sharing_copy(model)
    for name, weight in weights.items():
        made.get_parameter(name).data = weight.to(model.device, copy=True)
    apply_plan(made, family, plan, emulations)
    return made


class _Passed(nn.Module):
    """Takes the place of a block that runs elsewhere."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


class Student(nn.Module):
    """The blocks of a model from one on; the model's own forward runs them, with the stream put in before the first.

    Args:
        model: From `cut_copy`; its earlier blocks are taken out in place.
        family: Where its parts are.
        first: Index of the first block that runs.
    """

    def __init__(self, model: PreTrainedModel, family: Family, first: int) -> None:
        super().__init__()
        blocks = blocks_of(model, family)
        for index in range(first):
            blocks[index] = _Passed(blocks[index])
        self.body = model.get_submodule(family.blocks.rpartition(".")[0])
        self._entering: Tensor | None = None
        self._states: list[Tensor] = []
        blocks[first].register_forward_pre_hook(self._enter)
        for block in blocks[first:]:
            block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._entering, *arguments[1:])

    def _leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)

    def forward(self, rows: Tensor, entering: Tensor) -> list[Tensor]:
        """The stream after each of the blocks.

        Args:
            rows: int64 [b, T].
            entering: The stream before block `first`, [b, T, D].

        Returns:
            [b, T, D] each, the last of them what enters the final norm.
        """
        self._entering, self._states = entering, []
        self.body(input_ids=rows.to(entering.device), use_cache=False)
        states, self._entering, self._states = self._states, None, []
        return states


class Teacher:
    """The dense model, run once for what both models share and for what the student learns.

    Args:
        model: Dense model.
        family: Where its parts are.
        first: Blocks before this one are the same in both.
    """

    def __init__(self, model: PreTrainedModel, family: Family, first: int) -> None:
        self._evaluator = Evaluator(model, family, [])
        self.device = model.device
        self.first = first
        self.head = Head(model, family)

    @torch.no_grad()
    def __call__(self, rows: Tensor, *, entering_only: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The stream before block `first`, and that after it and each later block (none with `entering_only`)."""
        hidden, kwargs = self._evaluator.embed(rows)
        entering, states = hidden, []
        for index in range(len(self._evaluator.blocks)):
            if index == self.first:
                entering = hidden
                if entering_only:
                    break
            hidden = self._evaluator.run_block(index, hidden, kwargs[index], {})
            if index >= self.first:
                states.append(hidden)
        return entering, states


def head_gradient(
    head: Head, loss: Loss, final: Tensor, reference: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss of a student's final states and its gradient by them, one window's logits at a time.

    Args:
        head: Of the dense model.
        loss: "kl" or "next-token".
        final: What leaves the student's last block, [b, T, D].
        reference: The same of the dense model ("kl" only).
        rows: int64 [b, T].

    Returns:
        Loss float64 [] in nats/token, and gradient [b, T, D].

    Source: logit distillation, arXiv 1503.02531 at temperature 1, on the logits alone as in arXiv 2407.14679.
    """
    leaf = final.detach().to(head.projection.get_parameter("weight").dtype).requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64, device=leaf.device)
    for row in range(len(rows)):
        one = slice(row, row + 1)
        logits = head.logits(leaf[one])
        with torch.no_grad():
            wide = logits.detach()
            log_sum = torch.logsumexp(wide, -1, keepdim=True)
            if loss == "kl":
                assert reference is not None
                theirs = head.logits(reference[one])
                theirs -= torch.logsumexp(theirs, -1, keepdim=True)
                gradient = theirs.exp().neg_()
                total += ((theirs - wide + log_sum).mul_(gradient)).sum().double().neg() / len(wide)
            else:
                words = rows[one, 1:].reshape(-1, 1).to(wide.device)
                gradient = torch.zeros_like(wide).scatter_(-1, words, -1.0)
                total += (log_sum - wide.gather(-1, words)).sum().double() / len(wide)
            # Of -sum p log q, p the dense distribution or the next token alone, by the logits: q - p.
            gradient += (wide - log_sum).exp_()
        logits.backward(gradient / (len(wide) * len(rows)))
    assert leaf.grad is not None
    return total.cpu() / len(rows), leaf.grad.to(final.dtype)


def hidden_distance(states: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over blocks and tokens of ||s - t||^2 / ||t||^2, s the student's stream and t the dense one; float32 [].

    Source: the hidden-state loss of TinyBERT (arXiv 1909.10351, section 3.1). Inferred: no projection, since both
        are of one width; relative for each token, since a few massive activations otherwise are the whole sum.
    """
    parts = []
    for state, target in zip(states, targets, strict=True):
        wide = target.float()
        parts.append(((state.float() - wide).pow(2).sum(-1) / wide.pow(2).sum(-1).clamp_min(1e-12)).mean())
    return torch.stack(parts).mean()
