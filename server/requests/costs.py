"""What a request declares that it will cost: how many sequences, and what is over a limit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.errors import Refusal

ALL = float("inf")  # -1 asks for the whole vocabulary
# Lists whose strings and lists are sequences of their own: prompts, conversations, texts to embed or to score.
SEQUENCES = ("prompt", "prompt_embeds", "input", "messages", "items", "texts", "queries", "data_1", "data_2", "text_1",
             "text_2")  # fmt: skip
BOUNDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
STOPS = ("stop", "stop_sequences", "stop_token_ids", "bad_words")
TOKEN_LISTS = ("logit_bias", "allowed_token_ids")
GRAMMARS = ("response_format", "structured_outputs", "text", "tools", "functions")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request may ask for; the settings are called `max_` and these.

    Attributes:
        choices: Answers to one prompt (`n`, `best_of`).
        sequences: Choices times prompts.
        top_logprobs: Alternatives of each token written.
        prompt_logprobs: Alternatives of each token read; None: the engine would end on a request for any.
        stops: Entries of each list of words or tokens that end or forbid.
        logit_bias: Tokens with a bias, or in a list of allowed ones.
        grammar_bytes: Bytes of a JSON schema, a regular expression, a grammar, or of all tools.
        tools: Tools.
        pattern_size: Tokens of a pattern that vLLM's `repetition_detection` looks for after every token.
    """

    choices: int
    sequences: int
    top_logprobs: int
    prompt_logprobs: int | None
    stops: int
    logit_bias: int
    grammar_bytes: int
    tools: int
    pattern_size: int


def sequences(body: Any) -> int:
    """How many sequences a request keeps the engine busy with; 1 for what is no generation."""
    if not isinstance(body, dict):
        return 1
    choices = max([1, *(int(min(amount, 2**31)) for _, amount in _choices(body))])
    return choices * max(1, sum(_entries(body.get(name)) for name in _lists(body)))


def bounds_answer(body: Any) -> bool:
    """Whether a request says how long its answer may be."""
    return isinstance(body, dict) and any(_fields(body, BOUNDS))


def check(body: Any, size: int, limits: Limits) -> None:
    """Refuse a request that asks for more than a limit.

    Args:
        body: Parsed.
        size: Of the body in bytes; a small one holds no large grammar.
        limits: Of this server.

    Raises:
        Refusal: 400 that names the field and the limit.
    """
    if not isinstance(body, dict):
        return
    _most("choices", "choices", _choices(body), limits.choices)
    if (count := sequences(body)) > limits.sequences:
        names = [name for name in _lists(body) if _entries(body.get(name)) > 1] or ["n"]
        _most("sequences", "sequences (prompts times choices)", [(names[0], count)], limits.sequences)
    _most("top-logprobs", "log-probabilities a token", _top_logprobs(body), limits.top_logprobs)
    if limits.prompt_logprobs is None:
        for field, _ in _prompt_logprobs(body):
            text = f"`{field}` scores the prompt, which would end vLLM's engine here: a CPU with --enable-lora"
            raise Refusal(400, "unsupported_field", text, param=field)
    else:
        _most("prompt-logprobs", "log-probabilities a prompt token", _prompt_logprobs(body), limits.prompt_logprobs)
    _most("stops", "entries", _lengths(body, STOPS), limits.stops)
    _most("logit-bias", "tokens", _lengths(body, TOKEN_LISTS), limits.logit_bias)
    _most("tools", "tools", _lengths(body, ("tools", "functions")), limits.tools)
    patterns = body.get("repetition_detection")
    if isinstance(patterns, dict):
        asked = [("repetition_detection.max_pattern_size", _number(patterns.get("max_pattern_size")))]
        _most("pattern-size", "tokens of a pattern", asked, limits.pattern_size)
    if size > limits.grammar_bytes:
        sizes = ((at, len(json.dumps(value))) for at, value in _fields(body, GRAMMARS) if not isinstance(value, str))
        _most("grammar-bytes", "bytes of grammar", sizes, limits.grammar_bytes)


def _most(flag: str, unit: str, amounts: Any, limit: int) -> None:
    for field, amount in amounts:
        if amount > limit:
            asked = "all" if amount == ALL else f"{amount:.0f}"
            text = f"`{field}` asks for {asked} {unit}; this server takes at most {limit} (--max-{flag})"
            raise Refusal(400, "over_limit", text, param=field)


def _fields(body: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Fields that are there, also those within `sampling_params` of vLLM's routes for tokens."""
    inner = body.get("sampling_params")
    for place, fields in (("", body), ("sampling_params.", inner if isinstance(inner, dict) else {})):
        for name in names:
            if fields.get(name) is not None:
                yield place + name, fields[name]


def _number(value: Any) -> float:
    """As a lenient reader takes it ("10", 10.0); 0 if it is none, -1 asks for all."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return 0
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return 2.0**63 if isinstance(value, int) else 0
    return ALL if number == -1 else number


def _choices(body: dict[str, Any]) -> list[tuple[str, float]]:
    return [(at, _number(value)) for at, value in _fields(body, ("n", "best_of")) if _number(value) != ALL]


def _top_logprobs(body: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for at, value in _fields(body, ("top_logprobs", "logprobs")):
        yield at, _number(value)
    yield from _lengths(body, ("logprob_token_ids",))


def _prompt_logprobs(body: dict[str, Any]) -> Iterator[tuple[str, float]]:
    names = ("prompt_logprobs", "logprobs") if body.get("echo") else ("prompt_logprobs",)
    for at, value in _fields(body, names):
        yield at, _number(value)


def _lengths(body: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for at, value in _fields(body, names):
        if isinstance(value, (list, dict)):
            yield at, len(value)


def _lists(body: dict[str, Any]) -> tuple[str, ...]:
    return (*SEQUENCES, "documents") if "query" in body else SEQUENCES


def _entries(value: Any) -> int:
    return sum(isinstance(entry, (str, list)) for entry in value) if isinstance(value, list) else 0
