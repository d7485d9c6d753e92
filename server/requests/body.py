"""What the body of a request must be before it is let in: plain, strict JSON of a sane depth."""

import json
import re
from typing import Any

from server.errors import Refusal

DEPTH = 100
BRACKETS = (b"[", b"{")
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def is_json(content_type: str) -> bool:
    """Whether a body of this type is read as JSON."""
    media = content_type.partition(";")[0].strip().lower()
    return media == "application/json" or media.endswith("+json")


def check_encoding(content_encoding: str) -> None:
    """Refuse a compressed body.

    Raises:
        Refusal: 415.
    """
    if content_encoding.strip().lower() not in ("", "identity"):
        text = f"Content-Encoding {content_encoding[:40]!r} is not understood; send the body as it is"
        raise Refusal(415, "unsupported_encoding", text)


def parse(body: bytes) -> Any:
    """The value of a JSON body.

    Python's parser takes more than JSON: NaN, half a surrogate pair, UTF-16. Each of them fails later, in a tokenizer
    or in an answer, with a message about something else.

    Raises:
        Refusal: 400 with one sentence that says where.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _wrong(f"the body is not UTF-8: byte {error.start} is wrong") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _wrong(f"the body is not valid JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise _wrong(f"the body is nested deeper than {DEPTH} levels") from error
    except ValueError as error:
        raise _wrong(f"the body is not valid JSON: {str(error).partition(';')[0]}") from error
    if sum(map(body.count, BRACKETS)) > DEPTH and _deeper(value, DEPTH):
        raise _wrong(f"the body is nested deeper than {DEPTH} levels")
    if ESCAPED_SURROGATE.search(body):
        _check_surrogates(value, "")
    return value


def _wrong(text: str, param: str | None = None) -> Refusal:
    return Refusal(400, "invalid_json", text, param=param)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_surrogates(value: Any, path: str) -> None:
    if isinstance(value, str) and SURROGATE.search(value):
        text = f"`{path}` has half of a surrogate pair, which is no character" if path else "half of a surrogate pair"
        raise _wrong(text, path or None)
    if isinstance(value, dict):
        for key, child in value.items():
            _check_surrogates(key, path)
            _check_surrogates(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _check_surrogates(child, f"{path}[{index}]")
