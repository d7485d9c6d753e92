"""Synthetic prompts for long contexts: a few lines hidden in other text and asked for at its end, to an exact length.

    needle      one code at a depth of your choice
    keys        8 names, each with a code, spread evenly; all asked for, in another order
    values      4 codes of one name, spread evenly; each is to be completed from its first digits
    variable    a value behind 2 assignments, beside a second chain like it; asked for from the last variable on,
                assignment by assignment
    copy        a list of words at a depth, and the same list again at the end

The answers are part of the prompt. One forward then tells what greedy decoding would write as long as it is right.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruning.errors import CalibrationError
from pruning.texts.calibration import standard_library_text
from pruning.texts.words import NAMES, THINGS

KEYS = 8
VALUES = 4
HOPS = 2
LISTED = 24  # words of the list that is copied
GIVEN = 3  # of its second occurrence: nothing tells the first words
FILLER_CHARACTERS = 2**20  # of a text that are tokenised at least, where it has them
CHARACTERS_PER_TOKEN = 16

Piece = tuple[float, str]
"""A line and its place between the start (0) and the end (1) of the other text."""

Asked = tuple[str, str]
"""What precedes an answer, and the answer."""


@dataclass(frozen=True, slots=True, eq=False)
class LongPrompt:
    """A prompt with its answers in place.

    Attributes:
        tokens: int64 [T].
        spans: Start and length of every answer in `tokens`, in order.
        kind: One of `KINDS`.
        length: T.
        depth: Place of what is asked for, 0 to 1 of the other text; None where it is spread over all of it.
        guessed: Tokens at the start of every answer that its NLL leaves out.
    """

    tokens: Tensor
    spans: tuple[tuple[int, int], ...]
    kind: str
    length: int
    depth: float | None
    guessed: int = 0

    @property
    def answers(self) -> Tensor:
        """Positions of all tokens of all answers, int64 [n], in the order of `spans`."""
        return torch.cat([torch.arange(start, start + length) for start, length in self.spans])

    @property
    def counted(self) -> Tensor:
        """Which next tokens the NLL counts, bool [T-1]; as `Evaluator` takes it."""
        mask = torch.zeros(len(self.tokens) - 1, dtype=torch.bool)
        for start, length in self.spans:
            mask[start - 1 + min(self.guessed, length - 1) : start - 1 + length] = True
        return mask


@dataclass(frozen=True, slots=True)
class _Layout:
    """A prompt as text."""

    pieces: Sequence[Piece]
    asked: Sequence[Asked]
    depth: float | None = None
    guessed: int = 0
    begun: bool = False  # the first token with a letter or digit of every answer is given, not part of it


def _code(chance: random.Random) -> str:
    return str(chance.randint(10000, 99999))


def _spread(lines: Sequence[str]) -> list[Piece]:
    return [((i + 1) / (len(lines) + 1), line) for i, line in enumerate(lines)]


def _needle(chance: random.Random, depth: float) -> _Layout:
    name, code = chance.choice(NAMES), _code(chance)
    fact = f"\nThe code of {name} is"
    return _Layout([(depth, f"{fact} {code}.\n")], [(fact, f" {code}")], depth)


def _keys(chance: random.Random, depth: float, keys: int = KEYS) -> _Layout:
    facts = [(f"\nThe code of {name} is", f" {_code(chance)}") for name in chance.sample(NAMES, keys)]
    asked = chance.sample(facts, keys)
    closed = [(f".{cue}" if i else cue, code) for i, (cue, code) in enumerate(asked)]
    return _Layout(_spread([f"{cue}{code}.\n" for cue, code in facts]), closed, guessed=1)


def _values(chance: random.Random, depth: float) -> _Layout:
    name, firsts = chance.choice(NAMES), chance.sample(range(1, 10), VALUES)
    codes = [f"{first}{chance.randrange(10**4):04}" for first in firsts]
    asked = chance.sample(codes, VALUES)
    cue = f"\nThe {VALUES} codes of {name} are"
    pieces = _spread([f"\nA code of {name} is {code}.\n" for code in codes])
    return _Layout(pieces, [(cue if i == 0 else ",", f" {code}") for i, code in enumerate(asked)], begun=True)


def _variable(chance: random.Random, depth: float) -> _Layout:
    names = chance.sample(THINGS, 2 * (HOPS + 1))
    chains = []
    for variables in (names[: HOPS + 1], names[HOPS + 1 :]):
        chains.append(list(zip(variables, [_code(chance), *variables[:-1]], strict=True)))
    hops = [link for links in zip(*chains, strict=True) for link in links]
    followed = chains[chance.randrange(2)][::-1]
    return _Layout(
        _spread([f"\nVAR {name} = {source};\n" for name, source in hops]),
        [(f"{';' if i else ''}\nVAR {name} =", f" {source}") for i, (name, source) in enumerate(followed)],
    )


def _copy(chance: random.Random, depth: float) -> _Layout:
    words = chance.sample((*NAMES, *THINGS), LISTED)
    start = "\nThe words of the list are"
    cue = " ".join([start, *words[:GIVEN]])
    asked = [(cue if i == 0 else "", f" {word}") for i, word in enumerate(words[GIVEN:])]
    return _Layout([(depth, f"{' '.join([start, *words])}.\n")], asked, depth)


KINDS: Mapping[str, Callable[[random.Random, float], _Layout]] = {
    "needle": _needle, "keys": _keys, "values": _values, "variable": _variable, "copy": _copy,
}  # fmt: skip
PLACED = ("needle", "copy")
"""Kinds with a depth; the others spread over the whole text."""


def filler(tokenizer: PreTrainedTokenizerBase, text: str | None, length: int) -> Tensor:
    """Tokens of other text, for prompts of up to `length` tokens.

    Args:
        tokenizer: Of the model.
        text: Any; None: prose and code that every Python carries.
        length: T of the longest prompt.

    Returns:
        int64 [n], from the start of the text; n may be less than `length`.
    """
    text = standard_library_text() if text is None else text
    return torch.tensor(
        _encode(tokenizer, text[: max(FILLER_CHARACTERS, CHARACTERS_PER_TOKEN * length)]), dtype=torch.int64
    )


def long_prompts(
    kind: str, tokenizer: PreTrainedTokenizerBase, other: Tensor, length: int, depth: float, count: int, seed: int
) -> list[LongPrompt]:
    """Prompts of one kind, length and depth.

    Prompt i of a seed is the same at every depth but for where its lines stand, and the same in a larger `count`.

    Args:
        kind: One of `KINDS`.
        tokenizer: Of the model; its token that starts a text, where it has one, comes first.
        other: Text around the lines, int64 [n], see `filler`.
        length: T of every prompt.
        depth: 0 to 1, of kinds in `PLACED`; the others take no notice.
        count: How many.
        seed: Of names, codes and where `other` begins.

    Raises:
        CalibrationError: The length is too short for the lines, or the other text for the length.

    Source: Needle in a haystack (Kamradt 2023) and RULER, arXiv 2404.06654, sections 3.1 and 3.2. Inferred: answers are
        teacher-forced; codes of five digits; two chains of assignments, so that the value must be followed, hop by hop.
    """
    return [_one(KINDS[kind], kind, tokenizer, other, length, depth, f"{kind} {seed} {i}") for i in range(count)]


def code_prompts(
    tokenizer: PreTrainedTokenizerBase, text: str | None, length: int, count: int, seed: int, keys: int = KEYS
) -> list[LongPrompt]:
    """Prompts of kind "keys": codes hidden far away, as what layers are chosen by.

    The NLL (`LongPrompt.counted`) leaves out the first token of every code, which is a guess among prefixes.

    Args:
        tokenizer: Of the model.
        text: Around the codes; None: prose and code that every Python carries.
        length: T of every prompt.
        count: How many.
        seed: Of everything drawn.
        keys: Names in each; fewer fit shorter prompts.

    Raises:
        CalibrationError: The length is too short for the names, or the text for the length.
    """

    def layout(chance: random.Random, depth: float) -> _Layout:
        return _keys(chance, depth, keys)

    other = filler(tokenizer, text, length)
    return [_one(layout, "keys", tokenizer, other, length, 0.0, f"keys {seed} {i}") for i in range(count)]


def _one(
    draw: Callable[[random.Random, float], _Layout], kind: str, tokenizer: PreTrainedTokenizerBase, other: Tensor,
    length: int, depth: float, seed: str,
) -> LongPrompt:  # fmt: skip
    chance = random.Random(seed)
    layout = draw(chance, depth)
    pieces = [(place, _encode(tokenizer, line)) for place, line in layout.pieces]
    tail, spans = _tail(tokenizer, layout.asked)
    if layout.begun:
        spans = [_rest(tokenizer, tail, *span) for span in spans]
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    needed = len(start) + sum(len(ids) for _, ids in pieces) + len(tail)
    room = length - needed
    if room < len(pieces):
        raise CalibrationError(f"{length} tokens hold no prompt of kind {kind}, which needs {needed + len(pieces)}")
    if room > len(other):
        raise CalibrationError(
            f"the text around the prompts holds {len(other)} tokens, fewer than the {room} that {length} need"
        )
    first = int(chance.random() * (len(other) - room + 1))
    around = other[first : first + room].tolist()
    ids, last = start, 0
    for place, line in pieces:
        at = round(place * room)
        ids += around[last:at] + line
        last = at
    ids += around[last:]
    moved = tuple((len(ids) + begin, count) for begin, count in spans)
    return LongPrompt(torch.tensor(ids + tail), moved, kind, length, layout.depth, layout.guessed)


def _tail(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of all that is asked and answered, tokenised as one text, and the spans of the answers in it."""
    whole = _encode(tokenizer, "".join(cue + answer for cue, answer in asked))
    spans, text = [], ""
    for cue, answer in asked:
        text += cue
        begin = _common(whole, _encode(tokenizer, text))
        text += answer
        spans.append((begin, _common(whole, _encode(tokenizer, text)) - begin))
    return whole, spans


def _rest(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], begin: int, count: int) -> tuple[int, int]:
    """The span without its first token that is no space; where that would be all of it, the last token is kept."""
    given = 1 if tokenizer.decode([ids[begin]]).strip() else 2
    given = min(given, count - 1)
    return begin + given, count - given


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
