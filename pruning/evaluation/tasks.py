"""Multiple-choice questions as what subnetworks are judged on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.evaluation.choice import encode
from pruning.evaluation.questions import Question, read_questions, spread
from pruning.families import Family
from pruning.forward.blocks import Gone
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Objective

Judged = Literal["loss", "error"]


class TaskEvaluator(Evaluator):
    """Runs subnetworks over questions; every metric that reads "loss" then reads the task's.

    A batch is one question, a window the context with one choice. "loss" is the cross-entropy of the right choice under
    the softmax of the choices' log-likelihoods, in nats per question; or, judged by "error", 1 where another choice is
    likelier and 0 where none is. "kl" and "logits" are means over the tokens of the choices.

    Args:
        model: Dense model.
        family: Where its parts are.
        questions: At least one.
        tokenizer: The model's.
        judged: By what.
        settings: Of `Evaluator`.
    """

    answers_questions = True

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        judged: Judged = "loss",
        **settings: Any,
    ) -> None:
        encoded = [windows_of(question, tokenizer) for question in questions]
        self.judged: Judged = judged
        self._labels = [question.label for question in questions]
        batches, counted = [batch for batch, _ in encoded], [mask for _, mask in encoded]
        super().__init__(model, family, batches, counted=counted, **settings)

    def values(
        self, plans: Sequence[Gone], objective: Objective = "loss", advance: Callable[[], None] | None = None
    ) -> Tensor:
        """As `Evaluator.values`; for "loss" float64 [len(plans), questions]."""
        table = super().values(plans, objective, advance)
        if objective != "loss":
            return table
        return torch.stack([self._judge(table[:, self.span(n)], n) for n in range(len(self.batches))], 1)

    def _judge(self, means: Tensor, number: int) -> Tensor:
        """Loss or error of one question, from the mean cross-entropy of its choices' tokens, [plans, choices]."""
        assert self.counted is not None
        likelihoods = -means * self.counted[number].sum(1).double()
        if self.judged == "loss":
            return -likelihoods.log_softmax(1)[:, self._labels[number]]
        return (likelihoods.argmax(1) != self._labels[number]).double()


def windows_of(question: Question, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Context and choice, one row a choice, padded at the end.

    Returns:
        Tokens int64 [choices, T], and which next tokens belong to the choice, bool [choices, T-1].
    """
    context, choices = encode(tokenizer, question)
    length = len(context) + max(len(choice) for choice in choices)
    tokens = torch.zeros(len(choices), length, dtype=torch.int64)
    counted = torch.zeros(len(choices), length - 1, dtype=torch.bool)
    for row, choice in enumerate(choices):
        ids = torch.tensor([*context, *choice])
        tokens[row, : len(ids)] = ids
        counted[row, len(context) - 1 : len(ids) - 1] = True
    return tokens, counted


def read_task(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Question]:
    """Questions of a file, evenly spread over it, as many as about `tokens` tokens hold (at least 8).

    Raises:
        EvaluationError: The file is not one of questions.
    """
    questions = read_questions(path)
    some = spread(questions, 32)
    mean = sum(windows_of(question, tokenizer)[0].numel() for question in some) / len(some)
    return spread(questions, max(8, round(tokens / mean)))
