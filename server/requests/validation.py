"""What is wrong with a request's fields, in one sentence."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from server.engine.generation import raised_while_reading
from server.errors import error_response

UNREADABLE = (AssertionError, AttributeError, LookupError)
logger = logging.getLogger("shoal.validation")
NOUNS = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "iterable": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "none": "null",
}
Error = dict[str, Any]


async def refuse_invalid(request: Request, error: Exception) -> JSONResponse:
    """Handler of FastAPI's validation errors."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if errors and not isinstance(errors[0], dict):  # vLLM's own check of the content type
        given = request.headers.get("content-type", "")[:80]
        text = f"the content type must be application/json, not {given!r}" if given else "there is no content type"
        return error_response(415, "unsupported_media_type", text, retry=False)
    text, param = describe(errors, error.body)
    return error_response(400, None, text, param=param, retry=False)


async def refuse_unreadable(request: Request, error: Exception) -> JSONResponse:
    """Handler of what vLLM trips over in a request without a word, such as an assertion about a part of a message."""
    if not raised_while_reading(error):
        raise error
    logger.warning("a request could not be read: %s", type(error).__name__)
    return error_response(400, None, "`messages` or `input` has a part that this server cannot read", retry=False)


def describe(errors: Sequence[Error], body: Any) -> tuple[str, str | None]:
    """One sentence about the field that is wrong, and its name.

    Of a union pydantic lists what is wrong with it under each of its types. The types that some other field rules out
    (`role`, `type`) are left out; of what remains the field that most complain about is meant.

    Args:
        errors: pydantic's, at least one; `loc` begins with where FastAPI found it (`body`, `path`, `query`).
        body: What the client sent, parsed.
    """
    located = [(*_locate(error, body), error) for error in _of_likely_types(errors, body)]
    path = Counter(path for path, _, _ in located).most_common(1)[0][0]
    value, about = next((value, [e for p, _, e in located if p == path]) for p, value, _ in located if p == path)
    name, param = (f"`{path}`", path) if path else ("the body", None)
    if all(error["type"] == "missing" for error in about):
        return f"{name} is missing", param
    wanted = list(dict.fromkeys(noun for error in about if (noun := _noun(error))))
    if wanted:
        return f"{name} must be {' or '.join(wanted)}, not {_show(value)}", param
    message = " ".join(about[0]["msg"].removeprefix("Value error, ").split())
    if message.startswith("Input should be "):
        return f"{name} must be {message.removeprefix('Input should be ')}", param
    return f"{name}: {message}", param


def _noun(error: Error) -> str | None:
    if error["type"] in ("literal_error", "enum"):
        return str(error["ctx"]["expected"])
    stem, _, rest = error["type"].partition("_")
    return NOUNS.get(stem) if rest.startswith(("type", "parsing", "required", "from_float", "attributes")) else None


def _steps(error: Error, body: Any) -> list[tuple[Any, bool]]:
    """Each part of `loc` behind the first, and whether it is a place in the body; others name types of a union."""
    steps: list[tuple[Any, bool]] = []
    current: Any = body
    for index, step in enumerate(error["loc"][1:], 2):
        inside = (isinstance(current, dict) and step in current) or (
            isinstance(current, list) and isinstance(step, int) and step < len(current)
        )
        lacking = error["type"] == "missing" and index == len(error["loc"])
        elsewhere = error["loc"][0] != "body"
        steps.append((step, inside or lacking or elsewhere))
        if inside:
            current = current[step]
    return steps


def _locate(error: Error, body: Any) -> tuple[str, Any]:
    """A field's name such as `messages[0].content`, and its value."""
    path, value = "", body
    for step, real in _steps(error, body):
        if not real:
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
    return path, value if error["loc"][0] == "body" else error.get("input")


def _of_likely_types(errors: Sequence[Error], body: Any) -> Sequence[Error]:
    ruled_out = set()
    for error in errors:
        if error["type"] == "literal_error":
            kinds = [index for index, (_, real) in enumerate(_steps(error, body), 2) if not real]
            if kinds:
                ruled_out.add(tuple(error["loc"][: kinds[-1]]))
    likely = [error for error in errors if not any(tuple(error["loc"][: len(one)]) == one for one in ruled_out)]
    return likely or errors


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value[:40]}…"' if len(value) > 40 else f'"{value}"'
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else str(value)[:40]
