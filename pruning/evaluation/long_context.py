"""What a model finds in a long context: synthetic prompts, scored with their answers in place."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.console import Reporter
from pruning.evaluation.choice import FORWARD_TOKENS
from pruning.evaluation.paired import bootstrap, wilson
from pruning.evaluation.text import final_states, logits_of
from pruning.evaluation.wanted import LongTasks
from pruning.forward.blocks import Gone
from pruning.forward.evaluator import Evaluator
from pruning.texts.long_context import LongPrompt, filler, long_prompts
from pruning.texts.reading import read_text


@dataclass(frozen=True, slots=True)
class LongScore:
    """What a model made of one prompt.

    Attributes:
        nll: Mean negative log-likelihood of the counted tokens, nats/token.
        found: For every answer, whether each of its tokens is the likeliest after all before it: greedy decoding writes
            an answer exactly if it wrote those before it.
    """

    nll: float
    found: tuple[bool, ...]

    @property
    def share(self) -> float:
        """Share of the answers that are found."""
        return sum(self.found) / len(self.found)

    @property
    def exact(self) -> bool:
        """All answers are found."""
        return all(self.found)


@torch.inference_mode()
def score(
    model: PreTrainedModel, prompts: Sequence[LongPrompt], advance: Callable[[], None] | None = None
) -> list[LongScore]:
    """Score prompts by one forward each; logits are computed for the answers alone.

    Args:
        model: Dense or pruned.
        prompts: Of any lengths; those of one length run together where the device has room.
        advance: Called once a prompt.
    """
    scores: dict[int, LongScore] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    for length, same in itertools.groupby(order, key=lambda i: len(prompts[i].tokens)):
        rows = max(1, FORWARD_TOKENS.get(model.device.type, 4096) // length)
        members = list(same)
        for part in (members[first : first + rows] for first in range(0, len(members), rows)):
            states = final_states(model, torch.stack([prompts[i].tokens for i in part]))
            for i, state in zip(part, states, strict=True):
                scores[i] = _score(model, prompts[i], state)
                if advance:
                    advance()
    return [scores[i] for i in range(len(prompts))]


@torch.inference_mode()
def score_plan(
    evaluator: Evaluator, prompts: Sequence[LongPrompt], plan: Gone, advance: Callable[[], None] | None = None
) -> list[LongScore]:
    """Score prompts under a plan, block by block.

    Args:
        evaluator: Of the model, on the prompts, one in each batch.
        prompts: Of any lengths.
        plan: What takes the place of sublayers.
        advance: Called once a prompt.
    """
    scores: dict[int, LongScore] = {}
    norm = evaluator.model.get_submodule(evaluator.family.norm)
    for numbers in evaluator.rounds(list(range(len(prompts)))):
        for number, (hidden,) in evaluator.finals(numbers, [plan]):
            scores[number] = _score(evaluator.model, prompts[number], norm(hidden)[0, :-1])
            if advance:
                advance()
    return [scores[number] for number in range(len(prompts))]


def _score(model: PreTrainedModel, prompt: LongPrompt, states: Tensor) -> LongScore:
    """Score one prompt by its normed final states [T-1, D]."""
    places = prompt.answers - 1
    logits = logits_of(model, states[places.to(states.device)])
    wanted = prompt.tokens[places + 1].to(logits.device)
    nll = functional.cross_entropy(logits, wanted, reduction="none").double().cpu()[prompt.counted[places]]
    right = (logits.argmax(-1) == wanted).cpu().split([length for _, length in prompt.spans])
    return LongScore(float(nll.mean()), tuple(bool(answer.all()) for answer in right))


def summary(mine: Sequence[LongScore], theirs: Sequence[LongScore] | None, seed: int) -> dict[str, Any]:
    """Means over prompts with 95% intervals; against the dense model also its own and the paired differences.

    Args:
        mine: Of the model that is measured.
        theirs: Of the dense model on the same prompts.
        seed: Of the bootstrap.

    Returns:
        For JSON. `found`: share of the answers; `exact`: share of the prompts with all of them; `nll` in nats/token;
        `kept`: of the answers that the dense model finds, the share that this one finds too (None if it finds none).
    """
    out: dict[str, Any] = {"n": len(mine), "answers": sum(len(one.found) for one in mine), **_means(mine, seed)}
    if theirs is None:
        return out
    out |= {f"dense_{key}": value for key, value in _means(theirs, seed).items()}
    pairs = list(zip(mine, theirs, strict=True))
    out["found_difference"] = bootstrap([a.share - b.share for a, b in pairs], seed).as_dict()
    out["nll_difference"] = bootstrap([a.nll - b.nll for a, b in pairs], seed).as_dict()
    known = [x for a, b in pairs for x, y in zip(a.found, b.found, strict=True) if y]
    out["kept"] = sum(known) / len(known) if known else None
    return out


def _means(scores: Sequence[LongScore], seed: int) -> dict[str, dict[str, float]]:
    n, shares = len(scores), [one.share for one in scores]
    # Right or wrong, or all alike: Wilson's; a bootstrap says nothing there. Shares of several answers vary less.
    plain = {*shares} <= {0.0, 1.0} or len({*shares}) == 1
    found = wilson(math.fsum(shares) / n, n) if plain else bootstrap(shares, seed)
    return {
        "found": found.as_dict(),
        "exact": wilson(sum(one.exact for one in scores) / n, n).as_dict(),
        "nll": bootstrap([one.nll for one in scores], seed).as_dict(),
    }


def on_long_context(
    subject: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LongTasks,
    seed: int,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Measure every kind, length and depth, shortest first within a kind.

    Args:
        subject: What is measured.
        dense: To compare with, or None.
        tokenizer: Of both.
        tasks: What to hide, and where.
        seed: Of the prompts and the bootstrap.
        reporter: For progress.

    Returns:
        One row a cell: `kind`, `length`, `depth` (None where spread) and what `summary` gives.

    Raises:
        CalibrationError: A length is too short for its lines, or the text around too short for a length.
    """
    text = None if tasks.filler is None else read_text(tasks.filler, tokenizer)
    other = filler(tokenizer, text, max(tasks.lengths))
    # All prompts are made before any is scored: what does not fit is refused before it costs time.
    made = [
        long_prompts(kind, tokenizer, other, length, depth, tasks.prompts, seed)
        for kind, length, depth in tasks.cells()
    ]
    rows = []
    with reporter.progress("long context", sum(map(len, made)) * (1 if dense is None else 2)) as step:
        for prompts in made:
            mine = score(subject, prompts, step.advance)
            theirs = None if dense is None else score(dense, prompts, step.advance)
            first = prompts[0]
            cell = {"kind": first.kind, "length": first.length, "depth": first.depth}
            rows.append(cell | summary(mine, theirs, seed))
    return rows
