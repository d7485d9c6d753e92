"""Bodies that are no plain JSON, and where they are wrong."""

import json

import pytest

from server.errors import Refusal
from server.requests.body import DEPTH, parse


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at line 1, column 8"),
        (b"", "not valid JSON: Expecting value at line 1, column 1"),
        (nested(DEPTH + 1), f"nested deeper than {DEPTH} levels"),
        (nested(50_000), f"nested deeper than {DEPTH} levels"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, f"nested deeper than {DEPTH} levels"),
        (b'{"a": NaN}', "NaN is not a number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7 is wrong"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (rb'{"messages": [{"content": "\ud800"}]}', "`messages[0].content` has half of a surrogate pair"),
        (rb'{"\udc00": 1}', "half of a surrogate pair"),
        (rb'"\udc00"', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_is_refused_in_one_sentence(body, words):
    with pytest.raises(Refusal) as caught:
        parse(body)
    assert caught.value.status == 400
    assert words in caught.value.text
    assert "\n" not in caught.value.text


@pytest.mark.parametrize(
    "value", [{"a": "\U0001f600"}, [[1, 2], [3]], 5, json.loads(nested(DEPTH)), {"many": [[i] for i in range(1000)]}]
)
def test_json_is_taken_as_it_is(value):
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value
