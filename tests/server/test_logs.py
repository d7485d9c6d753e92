"""Request ids in and out, and what a log line says."""

import io
import json
import logging
import logging.config

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from server.logs import REQUEST_ID, RequestLog, logging_config


async def echo(request: Request) -> JSONResponse:
    logging.getLogger("shoal.test").info("inside")
    return JSONResponse({"header": request.headers["x-request-id"], "context": REQUEST_ID.get()})


@pytest.fixture
def lines(request):
    """Configures logging in a style and gives what was written, as text."""
    written = io.StringIO()
    config = logging_config("info", request.param)
    config["handlers"]["lines"]["stream"] = written
    logging.config.dictConfig(config)
    yield written
    for name in ("shoal", "uvicorn"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def client() -> TestClient:
    app = Starlette(routes=[Route("/v1/completions", echo, methods=["POST"]), Route("/health/live", echo)])
    return TestClient(RequestLog(app, quiet=("/health",)))


def test_an_id_is_taken_over_and_sent_back():
    answer = client().post("/v1/completions", headers={"X-Request-Id": "order-66"})
    assert answer.headers["x-request-id"] == "order-66"
    assert answer.json() == {"header": "order-66", "context": "order-66"}


@pytest.mark.parametrize("given", [None, "", "two words", 'quote"', "a" * 129, "new\tline", "ümlaut".encode()])
def test_a_missing_or_unsafe_id_is_replaced(given):
    http = client()
    headers = {} if given is None else {"X-Request-Id": given}
    ids = [http.post("/v1/completions", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(len(name) == 32 and name.isalnum() for name in ids)


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_json_lines_have_the_id_the_status_and_the_time_but_no_text_of_the_request(lines):
    http = client()
    http.post("/v1/completions?q=secret-query", headers={"X-Request-Id": "a1"}, json={"prompt": "secret prompt"})
    http.get("/health/live")
    inside, access, probe = (json.loads(line) for line in lines.getvalue().splitlines())
    assert inside["message"] == probe["message"] == "inside"
    assert inside["request_id"] == "a1"
    assert (access["request_id"], access["path"], access["status"]) == ("a1", "/v1/completions", 200)
    assert 0 < access["seconds"] < 60
    assert {"asctime", "levelname", "name", "process"} <= access.keys()
    assert "secret" not in lines.getvalue()


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_a_path_cannot_forge_a_line(lines):
    client().get("/v1/%0aINFO%20forged")
    assert lines.getvalue().count("\n") == 1
    assert "GET /v1/%0aINFO%20forged 404" in lines.getvalue()
