"""What models write: how long two agree word for word, and whether one can repeat what it has just read."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pruning.texts.words import NAMES, THINGS

ROWS = 8


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Continue prompts with the likeliest token each time; an end of text is not taken.

    Args:
        model: Dense or pruned.
        prompts: int64 [n, T].
        new_tokens: How many to write.

    Returns:
        int64 [n, new_tokens].
    """
    end = model.config.eos_token_id
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=end, pad_token_id=0
    )
    rows = []
    for part in prompts.to(model.device).split(ROWS):
        out = model.generate(part, attention_mask=torch.ones_like(part), generation_config=config)
        rows.append(out[:, prompts.shape[1] :].cpu())
    return torch.cat(rows)


def agreement(a: Tensor, b: Tensor) -> list[int]:
    """Number of tokens before the first difference, for every row of two int64 [n, T]."""
    return (a == b).long().cumprod(1).sum(1).tolist()


@dataclass(frozen=True, slots=True)
class Recall:
    """A list of facts, and the start of a sentence that repeats one of them.

    Attributes:
        prompt: Text to continue.
        answer: What has to come next.
    """

    prompt: str
    answer: str


def recall_prompts(count: int, facts: int, seed: int) -> list[Recall]:
    """Key-value recall: `facts` names with random four-digit codes, one of which is asked for again.

    Nothing in it can be known from training, so it measures what attention does in context.

    Source: associative recall, arXiv 2312.04927, as generation.
    """
    chance = random.Random(seed)
    prompts = []
    for _ in range(count):
        names = chance.sample(NAMES, facts)
        codes = [str(chance.randint(1000, 9999)) for _ in names]
        asked = chance.randrange(facts)
        lines = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
        prompts.append(Recall("\n".join([*lines, f"The code of {names[asked]} is"]), codes[asked]))
    return prompts


def copy_prompts(count: int, length: int, ahead: int, seed: int) -> list[Recall]:
    """Lists of `length` random words, read once whole and then again from the start; the next `ahead` words are due.

    Easier than `recall_prompts`, for small models: it asks for the head that looks for what followed last time.

    Source: induction heads, arXiv 2209.11895.
    """
    chance = random.Random(seed)
    prompts = []
    for _ in range(count):
        words = [chance.choice((*NAMES, *THINGS)) for _ in range(length)]
        again = chance.randrange(3, length - ahead)
        listed, start = " ".join(words), " ".join(words[:again])
        prompts.append(Recall(f"{listed}.\n{start}", " ".join(words[again : again + ahead])))
    return prompts


def recalled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Recall],
    advance: Callable[[], None] | None = None,
) -> list[bool]:
    """Whether greedy decoding continues each prompt with its answer, exact match; prompts of one length together."""
    rows = tokenizer([one.prompt for one in prompts])["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(rows[i]))
    found = [False] * len(prompts)
    for length, same in groupby(order, key=lambda i: len(rows[i])):
        for part in _batches(list(same)):
            new = max(len(tokenizer(f" {prompts[i].answer}", add_special_tokens=False)["input_ids"]) for i in part)
            written = greedy(model, torch.tensor([rows[i] for i in part]).view(-1, length), new + 1)
            for i, text in zip(part, tokenizer.batch_decode(written), strict=True):
                found[i] = text.strip().startswith(prompts[i].answer)
                if advance:
                    advance()
    return found


def _batches(numbers: list[int]) -> list[list[int]]:
    return [numbers[first : first + ROWS] for first in range(0, len(numbers), ROWS)]
