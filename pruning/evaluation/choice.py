"""Multiple-choice questions: log-likelihoods of the choices after a context, tokenised as in lm-evaluation-harness."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import EvaluationError
from pruning.evaluation.paired import bootstrap, standard_error
from pruning.evaluation.questions import Question

FORWARD_TOKENS = {"cpu": 1024, "cuda": 16384}
SHARED_TOKENS = 96  # a common start of contexts is computed once when it is at least this long


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of one question.

    Attributes:
        loglikelihoods: ln P(choice | context) of every choice, nats.
        correct: The likeliest choice is the right one.
        correct_norm: So is the likeliest per character.
    """

    loglikelihoods: tuple[float, ...]
    correct: bool
    correct_norm: bool


@dataclass(frozen=True, slots=True)
class _Encoded:
    index: int
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


def encode(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[list[int], list[list[int]]]:
    """Tokens of the context and of every choice.

    Spaces at the context's end go to the choice; context and choice are tokenised as one text, and the choice is what
    follows the context's own tokens. An empty context becomes the token that starts a text.

    Source: lm-evaluation-harness 0.4, `TemplateLM._encode_pair`.
    """
    context = question.context.rstrip()
    trailing = question.context[len(context) :]
    if not context:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        alone = [tokenizer(trailing + c, add_special_tokens=False)["input_ids"] for c in question.choices]
        return [start], alone
    texts = [context, *(context + trailing + choice for choice in question.choices)]
    first, *whole = tokenizer(texts, verbose=False)["input_ids"]
    return first, [ids[len(first) :] for ids in whole]


def _encoded(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], longest: int) -> list[_Encoded]:
    out = []
    for index, question in enumerate(questions):
        context, choices = encode(tokenizer, question)
        room = longest + 1 - max(map(len, choices))
        if room < 1 or not all(choices):
            raise EvaluationError(
                f"question {question.id} of {question.task}: a choice is empty or over {longest} tokens"
            )
        out.append(_Encoded(index, tuple(context[-room:]), tuple(map(tuple, choices))))
    return out


def _groups(encoded: Sequence[_Encoded]) -> list[tuple[int, list[_Encoded]]]:
    """Questions whose contexts start alike, with the number of tokens they share; the rest share none."""
    groups: list[tuple[int, list[_Encoded]]] = []
    alone: list[_Encoded] = []
    members: list[_Encoded] = []
    shared = 0

    def close() -> None:
        if len(members) > 1:
            groups.append((shared, members))
        else:
            alone.extend(members)

    for one in sorted(encoded, key=lambda e: e.context):
        common = min(shared, _common(members[0].context, one.context)) if members else 0
        if members and common >= max(SHARED_TOKENS, shared // 2):
            members.append(one)
            shared = min(common, len(one.context) - 1)
        else:
            close()
            members, shared = [one], len(one.context) - 1
    close()
    return [*groups, (0, alone)] if alone else groups


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _batches(members: Sequence[_Encoded], shared: int, budget: int) -> Iterator[list[_Encoded]]:
    """Members by length, as many at once as the larger of the two forwards allows."""
    batch: list[_Encoded] = []
    rows = width = context = 0
    for one in sorted(members, key=lambda e: (len(e.context), max(map(len, e.choices)), e.index)):
        new_context = max(context, len(one.context) - shared)
        new_width, new_rows = max(width, *map(len, one.choices)), rows + len(one.choices)
        if batch and max((len(batch) + 1) * new_context, new_rows * new_width) > budget:
            yield batch
            batch, new_rows, new_width, new_context = (
                [],
                len(one.choices),
                max(map(len, one.choices)),
                len(one.context) - shared,
            )
        batch.append(one)
        rows, width, context = new_rows, new_width, new_context
    if batch:
        yield batch


@torch.inference_mode()
def loglikelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    advance: Callable[[], None] | None = None,
) -> list[tuple[float, ...]]:
    """ln P(choice | context) of every choice of every question, nats.

    A context is computed once for all choices, and a long start that contexts share (few-shot examples) once for all.

    Args:
        model: Dense or pruned.
        tokenizer: Of the model.
        questions: In any order.
        advance: Called once a question.

    Raises:
        EvaluationError: A choice does not fit the model's positions.
    """
    longest = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
    encoded = _encoded(tokenizer, questions, longest)
    windowed = any(layer.is_sliding for layer in _cache(model).layers)
    # Windows count cache slots; padding between a shared start and the rest would shift them.
    groups = [(0, encoded)] if windowed else _groups(encoded)
    results: list[tuple[float, ...]] = [()] * len(questions)
    budget = FORWARD_TOKENS.get(model.device.type, 4096)
    for shared, members in groups:
        start = _cache(model)
        if shared:
            ids = torch.tensor([members[0].context[:shared]], device=model.device)
            model(input_ids=ids, past_key_values=start, use_cache=True, logits_to_keep=1)
        for batch in _batches(members, shared, budget):
            cache = copy.deepcopy(start) if shared else _cache(model)
            for one, values in zip(batch, _score(model, cache, shared, batch), strict=True):
                results[one.index] = values
                if advance:
                    advance()
    return results


def _cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def _score(
    model: PreTrainedModel, cache: DynamicCache, shared: int, batch: Sequence[_Encoded]
) -> list[tuple[float, ...]]:
    """Contexts padded on the left, then every choice of them on the right, on a cache that holds the shared start."""
    device, rows = model.device, len(batch)
    if shared:
        cache.batch_repeat_interleave(rows)
    rests = [one.context[shared:] for one in batch]
    width = max(map(len, rests))
    ids = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests], device=device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(r)) + [1] * len(r) for r in rests], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions[:, shared:], past_key_values=cache, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    first = out.logits[:, -1].float().log_softmax(-1)
    totals = [[float(first[row, choice[0]]) for choice in one.choices] for row, one in enumerate(batch)]
    longer = [(row, k) for row, one in enumerate(batch) for k, choice in enumerate(one.choices) if len(choice) > 1]
    if longer:
        cache.batch_select_indices(torch.tensor([row for row, _ in longer], device=device))
        texts = [batch[row].choices[k] for row, k in longer]
        for (row, k), value in zip(longer, _continue(model, cache, mask, longer, texts), strict=True):
            totals[row][k] += value
    return [tuple(values) for values in totals]


def _continue(
    model: PreTrainedModel, cache: DynamicCache, mask: Tensor, longer: Sequence[tuple[int, int]],
    texts: Sequence[tuple[int, ...]],
) -> list[float]:  # fmt: skip
    """ln P of all tokens but the first of each text, given the first and the cache."""
    device, width = mask.device, max(map(len, texts)) - 1
    padded = [list(text) + [0] * (width + 1 - len(text)) for text in texts]
    ids = torch.tensor(padded, device=device)
    present = torch.tensor([[1] * (len(text) - 1) + [0] * (width + 1 - len(text)) for text in texts], device=device)
    before = mask[[row for row, _ in longer]]
    whole = torch.cat([before, present], 1)
    positions = (whole.cumsum(1) - 1)[:, before.shape[1] :]
    logits = model(
        input_ids=ids[:, :-1], attention_mask=whole, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits.float()
    found = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].double()
    return (found * present).sum(1).tolist()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    advance: Callable[[], None] | None = None,
) -> list[Answer]:
    """Answer questions; see `loglikelihoods`. Ties go to the first choice."""
    return [
        judged(question, values)
        for question, values in zip(questions, loglikelihoods(model, tokenizer, questions, advance), strict=True)
    ]


def judged(question: Question, values: Sequence[float]) -> Answer:
    """Compare the log-likelihoods of a question's choices, as they are and per character."""
    per_character = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
    return Answer(
        tuple(values),
        correct=values.index(max(values)) == question.label,
        correct_norm=per_character.index(max(per_character)) == question.label,
    )


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """acc and acc_norm with their standard errors, and n."""
    right = [float(one.correct) for one in answers]
    normed = [float(one.correct_norm) for one in answers]
    return {
        "n": len(answers),
        "acc": math.fsum(right) / len(right),
        "acc_stderr": standard_error(right),
        "acc_norm": math.fsum(normed) / len(normed),
        "acc_norm_stderr": standard_error(normed),
    }


def differences(mine: Sequence[Answer], theirs: Sequence[Answer], seed: int = 0) -> dict[str, dict[str, float]]:
    """What the first model's acc and acc_norm are above the second's on the same questions, with 95% intervals."""
    out = {}
    for field, name in (("correct", "acc_difference"), ("correct_norm", "acc_norm_difference")):
        pairs = zip(mine, theirs, strict=True)
        out[name] = bootstrap([float(getattr(a, field)) - float(getattr(b, field)) for a, b in pairs], seed).as_dict()
    return out
