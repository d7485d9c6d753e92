"""The table of OpenAI's fields against the official client, and the refusals it makes."""

import typing

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.errors import Refusal
from server.requests.fields import FIELDS, check

CLIENT = {
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsStreaming,
    "/v1/completions": completion_create_params.CompletionCreateParamsStreaming,
    "/v1/responses": response_create_params.ResponseCreateParamsStreaming,
}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_the_client_can_send_is_in_the_table(path):
    assert set(typing.get_type_hints(CLIENT[path])) - set(FIELDS[path]) == set()


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "functions", [{"name": "f"}]),
        ("/v1/chat/completions", "function_call", {"name": "f"}),
        ("/v1/chat/completions", "modalities", ["text", "audio"]),
        ("/v1/chat/completions", "web_search_options", {}),
        ("/v1/completions", "best_of", 2),
        ("/v1/responses", "previous_response_id", "resp_1"),
        ("/v1/responses", "background", True),
    ],
)
def test_what_cannot_be_honoured_is_refused(path, field, value):
    with pytest.raises(Refusal, match=f"`{field}` is not supported: ") as caught:
        check(path, {field: value})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field, "unsupported_field")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"functions": [], "function_call": "none", "modalities": ["text"], "audio": None}),
        ("/v1/chat/completions", {"store": True, "verbosity": "low", "something": "new"}),
        ("/v1/completions", {"best_of": 1, "suffix": "x"}),
        ("/v1/responses", {"background": False, "previous_response_id": None}),
        ("/v1/embeddings", {"functions": [1]}),
        ("/v1/responses", "text"),
    ],
)
def test_what_asks_for_nothing_passes(path, body):
    check(path, body)


def test_a_server_that_stores_may_be_asked_for_what_it_stored():
    check("/v1/responses", {"previous_response_id": "resp_1", "background": True}, stores=True)
