"""What the port answers before the engine is there, and the hand-over to the real server."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import uvicorn
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from server.lifecycle import Lifecycle, Phase, Split
from server.opening import opening, opening_app


def get(port: int, path: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_while_starting_probes_and_requests_are_answered():
    client = TestClient(opening_app(Lifecycle(), REGISTRY, 2.0))
    assert client.get("/health/startup").status_code == 503
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").json() == {"status": "starting"}
    assert "shoal_ready 0.0" in client.get("/metrics").text
    refused = client.post("/v1/chat/completions", json={})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["code"] == "starting"


def test_no_connection_is_refused_when_the_real_server_takes_over():
    life = Lifecycle()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with opening(opening_app(life, REGISTRY, 1.0), [sock], {}):
            while get(port, "/health/live")[0] != 200:
                time.sleep(0.01)
            assert get(port, "/health/startup") == (503, {"status": "starting"})
        answers: list[tuple[int, dict]] = []
        waiting = threading.Thread(target=lambda: answers.append(get(port, "/health/ready")))
        waiting.start()  # nobody listens to the socket now, but it is open
        time.sleep(0.2)
        assert waiting.is_alive()
        life.become(Phase.READY)
        server = uvicorn.Server(uvicorn.Config(opening_app(life, REGISTRY, 1.0), lifespan="off", log_config=None))
        second = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock.dup()])))
        second.start()
        waiting.join(10)
        server.should_exit = True
        second.join(10)
    assert answers == [(200, {"status": "ready"})]


def test_operations_on_a_port_of_their_own():
    app = opening_app(Lifecycle(), REGISTRY, 1.0)
    api, operations = TestClient(Split(app, False)), TestClient(Split(app, True))
    for path in ("/health/live", "/metrics"):
        assert operations.get(path).status_code == 200
        assert api.get(path).status_code == 404
    assert operations.get("/v1/models").status_code == 404
    assert api.get("/v1/models").status_code == 503
