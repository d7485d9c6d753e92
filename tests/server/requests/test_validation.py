"""Messages about wrong fields, from the request classes of vLLM's routes."""

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers.chat_utils import _parse_chat_message_content_mm_part

from server.requests.validation import UNREADABLE, refuse_invalid, refuse_unreadable


@pytest.fixture(scope="module")
def client():
    app = FastAPI(exception_handlers={RequestValidationError: refuse_invalid})

    @app.post("/chat")
    def chat(request: ChatCompletionRequest):
        return {}

    @app.post("/batch")
    def batch(request: BatchChatCompletionRequest):
        return {}

    @app.post("/text")
    def text(request: CompletionRequest):
        return {}

    @app.post("/responses")
    def responses(request: ResponsesRequest):
        return {}

    for kind in UNREADABLE:
        app.add_exception_handler(kind, refuse_unreadable)

    @app.get("/parts")
    def parts(ours: bool):
        assert not ours
        _parse_chat_message_content_mm_part(5)

    @app.get("/items/{number}")
    def item(number: int, deep: bool = False):
        return {}

    return TestClient(app, raise_server_exceptions=False)


def said(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("route", "body", "message", "param"),
    [
        ("chat", said(None), "`messages[0].content` must be a string or a list, not null", "messages[0].content"),
        ("chat", said(5), "`messages[0].content` must be a string or a list, not 5", "messages[0].content"),
        ("chat", {"messages": ["x"]}, '`messages[0]` must be an object, not "x"', "messages[0]"),
        ("chat", {"messages": "x"}, '`messages` must be a list, not "x"', "messages"),
        ("chat", {}, "`messages` is missing", "messages"),
        ("chat", said("x") | {"temperature": "hot"}, '`temperature` must be a number, not "hot"', "temperature"),
        ("chat", said("x") | {"stop": 5}, "`stop` must be a string or a list, not 5", "stop"),
        ("chat", said("x") | {"tools": [{"type": "function"}]}, "`tools[0].function` is missing", "tools[0].function"),
        ("chat", said("x") | {"seed": 2**70}, "`seed` must be less than or equal to 9223372036854775807", "seed"),
        ("chat", said("x") | {"n": 1.5}, "`n` must be an integer, not 1.5", "n"),
        ("batch", {"messages": said(None)["messages"]}, "`messages[0]` must be a list, not an object", "messages[0]"),
        ("batch", {"messages": [said(None)["messages"]]},
         "`messages[0][0].content` must be a string or a list, not null", "messages[0][0].content"),
        ("text", {"prompt": 5}, "`prompt` must be a list or a string, not 5", "prompt"),
        ("text", {"prompt": "x", "echo": "sure"}, '`echo` must be true or false, not "sure"', "echo"),
        ("text", [], "the body must be an object, not a list", None),
        ("responses", {"input": 5}, "`input` must be a string or a list, not 5", "input"),
        ("responses", {}, "`input` is missing", "input"),
    ],
)  # fmt: skip
def test_one_sentence_names_the_field(client, route, body, message, param):
    answer = client.post(f"/{route}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (400, message, param)
    assert error["type"] == "invalid_request_error"


def test_a_type_that_no_branch_knows(client):
    error = client.post("/chat", json=said("x") | {"response_format": {"type": "foo"}}).json()["error"]
    assert error["param"] == "response_format.type"
    assert error["message"].startswith("`response_format.type` must be 'text', 'json_object' or 'json_schema' or ")
    error = client.post("/responses", json={"input": [{"type": "x"}]}).json()["error"]
    assert error["param"].startswith("input")
    assert len(error["message"]) < 300


def test_an_empty_body_and_parts_of_the_address(client):
    assert client.post("/chat").json()["error"]["message"] == "the body is missing"
    assert client.get("/items/x").json()["error"]["message"] == '`number` must be an integer, not "x"'
    assert client.get("/items/1?deep=maybe").json()["error"]["param"] == "deep"


def test_what_vllm_asserts_about_a_message_is_the_clients_error_and_other_assertions_are_not(client):
    answer = client.get("/parts?ours=false")
    assert answer.status_code == 400
    assert "cannot read" in answer.json()["error"]["message"]
    assert client.get("/parts?ours=true").status_code == 500
