"""What becomes of each field of OpenAI's API: one table, for the documents and for refusals.

A field that would change the answer and cannot be honoured is refused. One that changes only what it costs, where it is
kept or how it is labelled is ignored. The rest of vLLM's own fields is vLLM's matter.
"""

from dataclasses import dataclass
from typing import Any, Literal

from server.errors import Refusal


@dataclass(frozen=True, slots=True)
class Support:
    """How a field is met.

    Attributes:
        state: What happens to it.
        note: Why, or what about it.
        harmless: Values of a refused field that ask for nothing and pass.
        ours: Whether the refusal is Shoal's; else vLLM's, which knows models that can.
    """

    state: Literal["supported", "ignored", "refused"] = "supported"
    note: str = ""
    harmless: tuple[Any, ...] = (None,)
    ours: bool = True


def _supported(*names: str, **notes: str) -> dict[str, Support]:
    return {name: Support() for name in names} | {name: Support("supported", note) for name, note in notes.items()}


def _ignored(*names: str, **notes: str) -> dict[str, Support]:
    plain = {name: Support("ignored") for name in names}
    return plain | {name: Support("ignored", note) for name, note in notes.items()}


def _refused(note: str, *harmless: Any) -> Support:
    return Support("refused", note, (None, *harmless))


CACHE = ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
FIELDS: dict[str, dict[str, Support]] = {
    "/v1/chat/completions": {
        **_supported(
            "model", "frequency_penalty", "max_tokens", "max_completion_tokens", "presence_penalty", "seed", "stream",
            "stream_options", "temperature", "top_p", "logprobs", "parallel_tool_calls",
            messages="text; other content as the model takes it", n="at most `--max-choices`",
            stop="at most `--max-stops`", logit_bias="at most `--max-logit-bias`",
            top_logprobs="at most `--max-top-logprobs`", tools="of type `function`",
            tool_choice="`auto` needs a parser, see below", response_format="at most `--max-grammar-bytes`",
            reasoning_effort="where the chat template reads it",
        ),
        **_ignored(
            "metadata", "prediction", "safety_identifier", "service_tier", "user", "verbosity", *CACHE,
            store="nothing is stored",
        ),
        "audio": _refused("answers are text"),
        "modalities": _refused("answers are text", [], ["text"]),
        "function_call": _refused("use `tool_choice`", "none", "auto"),
        "functions": _refused("use `tools`", []),
        "moderation": _refused("nothing here moderates"),
        "web_search_options": _refused("nothing here searches"),
    },
    "/v1/completions": {
        **_supported(
            "model", "echo", "frequency_penalty", "max_tokens", "presence_penalty", "seed", "stream", "stream_options",
            "temperature", "top_p", prompt="prompts times `n` at most `--max-sequences`", n="at most `--max-choices`",
            stop="at most `--max-stops`", logit_bias="at most `--max-logit-bias`",
            logprobs="at most `--max-top-logprobs`, with `echo` at most `--max-prompt-logprobs`",
        ),
        **_ignored("user"),
        "best_of": _refused("unless 1; use `n`", 1),
        "suffix": Support("refused", "unless the model can fill in", ours=False),
    },
    "/v1/responses": {
        **_supported(
            "input", "instructions", "model", "max_output_tokens", "metadata", "parallel_tool_calls", "stream",
            "temperature", "text", "tool_choice", "top_p", "truncation", "include",
            tools="of type `function`", top_logprobs="at most `--max-top-logprobs`",
            reasoning="`effort`, where the chat template reads it",
            service_tier="`auto`, `default`, `flex`, `scale`, `priority`; all are the same",
        ),
        **_ignored(
            "access_programs", "background_options", "context_management", "image", "max_tool_calls",
            "safety_identifier", "stream_options", "user", *CACHE, store="nothing is stored",
        ),
        "background": _refused("nothing is stored", False),
        "conversation": _refused("nothing is stored; send the whole `input`"),
        "moderation": _refused("nothing here moderates"),
        "previous_response_id": _refused("nothing is stored; send the whole `input`"),
        "prompt": _refused("nothing is stored"),
    },
}  # fmt: skip
STORED = ("background", "conversation", "previous_response_id", "prompt")


def check(path: str, body: Any, *, stores: bool = False) -> None:
    """Refuse a field that cannot be honoured.

    Args:
        path: Of the request.
        body: Parsed.
        stores: Whether vLLM was told to keep responses (`VLLM_ENABLE_RESPONSES_API_STORE`): what needs that is its own.

    Raises:
        Refusal: 400 that names it.
    """
    if not isinstance(body, dict):
        return
    for name, support in FIELDS.get(path, {}).items():
        if support.state != "refused" or not support.ours or name not in body or (stores and name in STORED):
            continue
        value = body[name]
        if not any(value == one and type(value) is type(one) for one in support.harmless):
            raise Refusal(400, "unsupported_field", f"`{name}` is not supported: {support.note}", param=name)


def table() -> str:
    """The fields of each route as a Markdown table, for `docs/use/serve.md`."""
    lines = ["| route | supported | ignored | refused with 400 |", "|---|---|---|---|"]
    for path, fields in FIELDS.items():
        cells = [_cell(fields, state) for state in ("supported", "ignored", "refused")]
        lines.append(f"| `POST {path}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(fields: dict[str, Support], state: str) -> str:
    these = {name: one.note for name, one in sorted(fields.items()) if one.state == state}
    return ", ".join(f"`{name}` ({note})" if note else f"`{name}`" for name, note in these.items())
