"""Two plans behind one address: nginx with our files in front of two servers that say who they are."""

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.paths import DEPLOY
from tests.deploy.tools import program

MODULES = Path("/usr/lib/nginx/modules")
NAMES = {"dense": "smollm2-135m", "window": "smollm2-135m-window"}


@contextmanager
def plan(name: str) -> Iterator[int]:
    """A server of one model, on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: Any, status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            card = {"id": NAMES[name], "key": self.headers.get("Authorization")}
            self.answer({"object": "list", "data": [card]} if self.path == "/v1/models" else {"path": self.path})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.answer({"plan": name, "bytes": len(self.rfile.read(length)), "path": self.path})

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


@contextmanager
def nginx(folder: Path, dense: int, window: int) -> Iterator[str]:
    """Address of an nginx with our files before servers on two ports."""
    if not (MODULES / "ngx_http_js_module.so").exists():
        pytest.skip("nginx's JavaScript module is not installed")
    (folder / "modules").symlink_to(MODULES)
    (folder / "plans.js").write_text((DEPLOY / "nginx" / "plans.js").read_text())
    ports = {"8001": dense, "8002": window, "8080": free_port()}
    text = (DEPLOY / "nginx" / "plans.conf").read_text()
    for port, real in ports.items():
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{real}")
    (folder / "plans.conf").write_text(text)
    command = [program("nginx"), "-p", str(folder), "-c", str(folder / "plans.conf"), "-g", "daemon off;"]
    with subprocess.Popen(command) as process:
        url = f"http://127.0.0.1:{ports['8080']}"
        try:
            deadline = time.monotonic() + 10
            while not listens(url):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def listens(url: str) -> bool:
    """Whether something answers there."""
    try:
        ask(url, "/v1/models")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where both plans are."""
    with plan("dense") as dense, plan("window") as window, nginx(tmp_path_factory.mktemp("a"), dense, window) as url:
        yield url


def ask(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, body and headers of an answer."""
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


@pytest.mark.parametrize(
    ("model", "expected"),
    [("smollm2-135m", "dense"), ("smollm2-135m-window", "window"), ("other", "dense"), (None, "dense"), (5, "dense")],
)
def test_the_model_of_a_request_chooses_the_plan(address: str, model: Any, expected: str) -> None:
    body = json.dumps({"model": model, "prompt": "x" * 100_000}).encode()
    status, answer, headers = ask(address, "/v1/completions?a=b", body)
    assert (status, answer) == (200, {"plan": expected, "bytes": len(body), "path": "/v1/completions?a=b"})
    assert headers["X-Upstream"] == expected


def test_a_body_that_is_no_json_is_the_first_plans_to_judge(address: str) -> None:
    assert ask(address, "/v1/completions", b"{")[1]["plan"] == "dense"
    assert ask(address, "/v1/completions", b"x" * (3 * 2**20))[1]["bytes"] == 3 * 2**20


def test_models_are_those_of_all_plans(address: str) -> None:
    _, answer, _ = ask(address, "/v1/models", Authorization="Bearer k")
    assert answer["object"] == "list"
    assert answer["data"] == [{"id": name, "key": "Bearer k"} for name in NAMES.values()]
    _, answer, headers = ask(address, "/v1/models/smollm2-135m-window")
    assert (answer["path"], headers["X-Upstream"]) == ("/v1/models/smollm2-135m-window", "window")


def test_what_nginx_refuses_itself_is_an_openai_error(address: str) -> None:
    status, answer, _ = ask(address, "/v1/completions", b"x" * (5 * 2**20))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_plan_that_is_down_takes_only_its_own_requests_with_it(tmp_path: Path) -> None:
    with plan("dense") as dense, nginx(tmp_path, dense, free_port()) as url:
        status, answer, _ = ask(url, "/v1/completions", b'{"model": "smollm2-135m-window"}')
        assert (status, answer["error"]["code"]) == (503, "model_down")
        assert ask(url, "/v1/completions", b'{"model": "smollm2-135m"}')[0] == 200
        assert [card["id"] for card in ask(url, "/v1/models")[1]["data"]] == ["smollm2-135m"]
