"""Keys, limits, the gate and the stop-watch, on a small real ASGI application."""

import asyncio
import gzip
import json

import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from server.admission import Admission
from server.auth import Authenticate, KeyRing, read_keys
from server.errors import SettingsError
from server.lifecycle import Gate, Lifecycle, Phase
from server.metrics import Measure
from server.requests.costs import Limits


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"bytes": len(await request.body())})


async def stream(request: Request) -> StreamingResponse:
    async def pieces():
        for word in ("one", "two", "three"):
            yield f"data: {word}\n\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(pieces(), media_type="text/event-stream")


def application() -> Starlette:
    return Starlette(routes=[
        Route("/v1/chat/completions", echo, methods=["POST"]),
        Route("/v1/stream", stream, methods=["POST"]),
        Route("/health/live", echo),
    ])  # fmt: skip


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# team keys\nalice:secret-a\n\nbob:secret:b\n")
    return path


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({"Authorization": "Bearer secret-a"}, 200),
        ({"Authorization": "bearer secret:b"}, 200),
        ({"x-api-key": "secret-a"}, 200),
        ({"Authorization": "Bearer secret-c"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic secret-a"}, 401),
        ({}, 401),
    ],
)
def test_only_known_keys_pass(keys, header, status):
    client = TestClient(Authenticate(application(), KeyRing(keys)))
    answer = client.post("/v1/chat/completions", headers=header)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health/live").status_code == 200


def test_keys_are_read_again_when_the_file_changes(keys):
    client = TestClient(Authenticate(application(), KeyRing(keys)))
    new = {"Authorization": "Bearer fresh"}
    assert client.post("/v1/chat/completions", headers=new).status_code == 401
    replacement = keys.with_name("new")
    replacement.write_text("carol:fresh\n")
    replacement.rename(keys)
    assert client.post("/v1/chat/completions", headers=new).status_code == 200
    keys.write_text("broken")
    assert client.post("/v1/chat/completions", headers=new).status_code == 200


@pytest.mark.parametrize("text", ["", "# nothing\n", "no colon\n", ":key\n", "name:\n"])
def test_a_useless_keys_file_is_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError):
        read_keys(path)


def test_large_bodies_are_refused_declared_or_not():
    client = TestClient(Admission(application(), 4, 4, 100, 1.0))
    assert client.post("/v1/chat/completions", content=b"x" * 100).json() == {"bytes": 100}
    assert client.post("/v1/chat/completions", content=b"x" * 101).status_code == 413
    chunks = (b"x" * 50 for _ in range(3))
    answer = client.post("/v1/chat/completions", content=chunks)
    assert answer.status_code == 413
    assert answer.headers["x-should-retry"] == "false"


def test_a_full_queue_answers_at_once():
    asyncio.run(fill_the_queue())


async def fill_the_queue():
    release, statuses = asyncio.Event(), []

    async def slow(scope, receive, send):
        await release.wait()
        await JSONResponse({})(scope, receive, send)

    guard = Admission(slow, 2, 1, 100, 1.5)
    scope = {"type": "http", "method": "POST", "headers": [], "path": "/v1/completions"}

    async def request():
        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append((message["status"], dict(message["headers"]).get(b"retry-after")))

        await guard(scope, receive, send)

    # Three requests of one sequence each; how a request of many counts is tested below.
    inside = [asyncio.create_task(request()) for _ in range(3)]
    await asyncio.sleep(0)
    await request()
    assert statuses == [(503, b"2")]
    release.set()
    await asyncio.gather(*inside)
    assert [status for status, _ in statuses] == [503, 200, 200, 200]
    assert guard.inside == 0


def test_a_request_counts_as_many_times_as_it_asks_for_sequences():
    asyncio.run(fill_the_queue_with_choices())


async def fill_the_queue_with_choices():
    release, statuses, seen = asyncio.Event(), [], []

    async def slow(scope, receive, send):
        seen.append(json.loads((await receive())["body"]))
        await release.wait()
        await JSONResponse({})(scope, receive, send)

    guard = Admission(slow, 2, 6, 1000, 1.0)

    async def request(**fields):
        body, parts = json.dumps(fields).encode(), []
        parts.extend([body[:5], body[5:]])

        async def receive():
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append((fields["n"], message["status"]))

        scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        await guard(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send)

    first = asyncio.create_task(request(prompt="x", n=6))
    await asyncio.sleep(0)
    assert guard.inside == 6
    await request(prompt="x", n=3)
    await request(prompt=["x", "y"], n=2)
    second = asyncio.create_task(request(prompt="x", n=2))
    await asyncio.sleep(0)
    assert guard.inside == 8
    assert statuses == [(3, 503), (2, 503)]
    release.set()
    await asyncio.gather(first, second)
    assert guard.inside == 0
    await request(prompt="x", n=16)  # alone it is let in, or it never would be
    assert statuses[2:] == [(6, 200), (2, 200), (16, 200)]
    assert seen[0] == {"prompt": "x", "n": 6}


def test_what_is_no_plain_json_is_refused_before_the_application():
    client = TestClient(Admission(application(), 4, 4, 10**6, 1.0, Limits(16, 256, 20, 5, 16, 1024, 2**16, 128, 128)))

    def post(content: bytes, **headers: str):
        return client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"} | headers
        )

    assert post(b'{"n": 2}').json() == {"bytes": 8}
    for answer, status, code in (
        (post(gzip.compress(b"{}"), **{"content-encoding": "gzip"}), 415, "unsupported_encoding"),
        (post(b"[" * 50_000), 400, "invalid_json"),
        (post(b'{"n": 10000}'), 400, "over_limit"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert post(b'{"n": 10000}').json()["error"]["param"] == "n"


def test_the_route_of_a_request_with_a_key_is_counted(keys):
    client = TestClient(Measure(Authenticate(application(), KeyRing(keys))))
    labels = {"route": "/v1/chat/completions", "status": "200"}
    name = "shoal_request_duration_seconds_count"
    before = REGISTRY.get_sample_value(name, labels) or 0
    assert client.post("/v1/chat/completions", headers={"x-api-key": "secret-a"}).status_code == 200
    assert REGISTRY.get_sample_value(name, labels) == before + 1


def test_the_gate_is_shut_before_ready_and_while_draining():
    life = Lifecycle()
    client = TestClient(Gate(application(), life, 1.0))
    for phase, status in ((None, 503), (Phase.READY, 200), (Phase.DRAINING, 503)):
        if phase:
            life.become(phase)
        answer = client.post("/v1/chat/completions")
        assert answer.status_code == status
        assert ("retry-after" in answer.headers) == (status == 503)
        assert client.get("/health/live").status_code == 200


def test_requests_and_the_pieces_of_streams_are_timed():
    client = TestClient(Measure(application()))

    def count(name: str) -> float:
        labels = {"route": "/v1/stream", "status": "200"}
        return REGISTRY.get_sample_value(f"shoal_{name}_seconds_count", labels) or 0

    before = [count(n) for n in ("request_duration", "time_to_first_token", "inter_token_latency")]
    assert client.post("/v1/stream").text.count("data:") == 3
    client.get("/no/such/path/1")
    after = [count(n) for n in ("request_duration", "time_to_first_token", "inter_token_latency")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 2]
    unmatched = REGISTRY.get_sample_value(
        "shoal_request_duration_seconds_count", {"route": "unmatched", "status": "404"}
    )
    assert unmatched
