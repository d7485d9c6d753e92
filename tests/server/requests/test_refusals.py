"""Errors and HEAD through the layers that every answer passes, on small real applications."""

import json
import logging

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.testclient import TestClient

from server.app import dress
from server.lifecycle import Lifecycle, Split

CORS = {"allow_origins": ["https://good.example"], "allow_methods": ["*"], "allow_headers": ["*"]}
GOOD, BAD = {"Origin": "https://good.example"}, {"Origin": "https://bad.example"}


class WrongFieldError(Exception):
    """As vLLM's: what is wrong with which field."""

    parameter = "stop"


class NoRoomError(Exception):
    """As ours: what a later turn of a request is refused for."""

    http_status = 429


@pytest.fixture(scope="module")
def app():
    app = FastAPI()

    @app.exception_handler(NoRoomError)
    @app.exception_handler(WrongFieldError)
    def wrong(request, error):
        return JSONResponse({}, 400)

    @app.get("/v1/stream/{kind}")
    def stream(kind: str):
        async def pieces():
            yield "data: one\n\n"
            if kind != "whole":
                raise {"wrong": WrongFieldError("no such token (parameter=stop)"), "full": NoRoomError("full"),
                       "crash": ZeroDivisionError("x")}[kind]  # fmt: skip

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app.router.routes.extend(Lifecycle().routes())

    @app.get("/v1/things")
    def things():
        return {"things": [1, 2]}

    @app.post("/v1/things")
    def more(kind: str):
        answers = {
            "vllm": JSONResponse({"error": {"message": "no (parameter=n)", "type": "BadRequestError", "param": "n",
                                            "code": 400}}, 400),
            "model": JSONResponse({"error": {"message": "no such model", "type": "NotFoundError", "param": "model",
                                             "code": 404}}, 404),
            "anthropic": JSONResponse({"type": "error", "error": {"type": "not_found_error", "message": "no"}}, 404),
            "bare": JSONResponse({"error": "Unauthorized"}, 401),
            "text": PlainTextResponse("I am a teapot", 418),
            "empty": PlainTextResponse("", 502),
            "page": PlainTextResponse("x" * 1000, 502),
        }  # fmt: skip
        if kind == "crash":
            raise ZeroDivisionError
        if kind == "detail":
            raise HTTPException(409, "two at once")
        return answers[kind]

    return app


@pytest.fixture
def client(app):
    return TestClient(dress(app, CORS), raise_server_exceptions=False)


def check(answer, status: int) -> dict:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("kind", "status", "message", "type_", "code"),
    [
        ("vllm", 400, "no", "invalid_request_error", None),
        ("model", 404, "no such model", "not_found_error", "model_not_found"),
        ("bare", 401, "Unauthorized", "authentication_error", None),
        ("detail", 409, "two at once", "invalid_request_error", None),
        ("text", 418, "I am a teapot", "invalid_request_error", None),
        ("empty", 502, "bad gateway", "server_error", None),
        ("page", 502, "bad gateway", "server_error", None),
        ("crash", 500, "Internal Server Error", "server_error", None),
    ],
)
def test_every_error_is_openais(client, kind, status, message, type_, code):
    error = check(client.post("/v1/things", params={"kind": kind}), status)
    assert (error["message"], error["type"], error["code"]) == (message, type_, code)


def test_unknown_paths_and_methods(client):
    assert check(client.get("/v1/nothing"), 404)["message"] == "there is no /v1/nothing here"
    answer = client.delete("/v1/things")
    assert "does not take DELETE; it takes" in check(answer, 405)["message"]
    assert answer.headers["allow"]


def test_other_bodies_stay(client):
    answer = client.post("/v1/things", params={"kind": "anthropic"})
    assert answer.json() == {"type": "error", "error": {"type": "not_found_error", "message": "no"}}
    assert client.get("/health/ready").json() == {"status": "starting"}


def test_a_crash_outside_the_framework_is_an_error_too():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    client = TestClient(dress(broken, CORS), raise_server_exceptions=False)
    assert check(client.get("/v1/things"), 500)["message"] == "the server failed at this request"


def test_a_browser_may_read_errors_and_is_refused_in_json(client):
    answer = client.get("/v1/nothing", headers=GOOD)
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    ask = {"Access-Control-Request-Method": "POST"}
    assert client.options("/v1/things", headers=GOOD | ask).status_code == 200
    assert check(client.options("/v1/things", headers=BAD | ask), 400)["message"] == "Disallowed CORS origin"


def test_head_is_get_without_a_body(client, caplog):
    got = client.get("/v1/things")
    with caplog.at_level(logging.INFO, "shoal.access"):
        head = client.head("/v1/things")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    assert "HEAD /v1/things 200" in caplog.text
    assert client.head("/v1/nothing").status_code == 404


def test_a_wrong_port_has_a_request_id(app):
    answer = TestClient(dress(Split(app, True), CORS)).get("/v1/things")
    assert check(answer, 404)["code"] == "wrong_port"
    assert json.loads(answer.text)["error"]["message"] == "there is no /v1/things on this port; ask the API's port"


@pytest.mark.parametrize(
    ("kind", "message", "type_", "param"),
    [
        ("wrong", "no such token", "invalid_request_error", "stop"),
        ("full", "full", "rate_limit_error", None),
        ("crash", "the server failed at this request", "server_error", None),
    ],
)
def test_a_stream_that_breaks_says_so_in_its_last_event(client, kind, message, type_, param):
    first, last = client.get(f"/v1/stream/{kind}").text.strip().split("\n\n")
    assert first == "data: one"
    assert last.startswith("event: error\ndata: ")
    event = json.loads(last.partition("data: ")[2])
    assert event["error"] == {"message": message, "type": type_, "param": param, "code": None}
    assert (event["type"], event["message"], event["sequence_number"]) == ("error", message, 1)


def test_a_whole_stream_stays(client):
    assert client.get("/v1/stream/whole").text == "data: one\n\n"
