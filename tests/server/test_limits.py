"""Rate limits of keys, with a clock set by hand."""

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from server.auth import Authenticate, Key, KeyRing, read_keys
from server.errors import SettingsError
from server.limits import RateLimit, spend_tokens

ALICE, BOB = {"Authorization": "Bearer secret-a"}, {"Authorization": "Bearer secret-b"}


async def spend(request: Request) -> JSONResponse:
    charge = spend_tokens()
    if charge is not None:
        charge(int(request.query_params.get("tokens", 0)))
    return JSONResponse({"limited": charge is not None})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def client(path, clock, requests=None, tokens=None, share=1.0) -> TestClient:
    app = Starlette(routes=[Route("/v1/completions", spend, methods=["POST"]), Route("/health/live", spend)])
    return TestClient(Authenticate(RateLimit(app, requests, tokens, share, clock), KeyRing(path)))


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("alice:secret-a\nbob:secret-b requests_per_minute=1 tokens_per_minute=50\n")
    return path


def test_requests_over_the_limit_get_429_until_the_bucket_fills(keys):
    clock = Clock()
    http = client(keys, clock, requests=6)
    assert [http.post("/v1/completions", headers=ALICE).status_code for _ in range(7)] == [200] * 6 + [429]
    answer = http.post("/v1/completions", headers=ALICE)
    assert answer.headers["retry-after"] == "10"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert http.get("/health/live").status_code == 200
    clock.now += 10
    assert [http.post("/v1/completions", headers=ALICE).status_code for _ in range(2)] == [200, 429]
    clock.now += 3600
    assert [http.post("/v1/completions", headers=ALICE).status_code for _ in range(7)] == [200] * 6 + [429]


def test_each_key_has_its_own_bucket_and_may_have_its_own_limit(keys):
    http = client(keys, Clock(), requests=3)
    assert [http.post("/v1/completions", headers=BOB).status_code for _ in range(2)] == [200, 429]
    assert [http.post("/v1/completions", headers=ALICE).status_code for _ in range(4)] == [200] * 3 + [429]


def test_tokens_are_drawn_when_they_are_known_and_debt_is_waited_off(keys):
    clock = Clock()
    http = client(keys, clock, tokens=60)
    assert http.post("/v1/completions?tokens=80", headers=ALICE).json() == {"limited": True}
    refused = http.post("/v1/completions", headers=ALICE)
    assert refused.status_code == 429
    assert "tokens per minute" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "21"
    clock.now += 21
    assert http.post("/v1/completions", headers=ALICE).status_code == 200


def test_without_a_token_limit_nothing_is_counted(keys):
    http = client(keys, Clock())
    assert http.post("/v1/completions?tokens=80", headers=ALICE).json() == {"limited": False}


def test_processes_that_share_the_traffic_share_the_limit(keys):
    http = client(keys, Clock(), requests=6, share=0.5)
    assert [http.post("/v1/completions", headers=ALICE).status_code for _ in range(4)] == [200] * 3 + [429]


def test_a_changed_limit_holds_without_a_restart(keys):
    http = client(keys, Clock())
    assert [http.post("/v1/completions", headers=BOB).status_code for _ in range(2)] == [200, 429]
    keys.write_text("bob:secret-b requests_per_minute=3\n")
    assert [http.post("/v1/completions", headers=BOB).status_code for _ in range(4)] == [200] * 3 + [429]


def test_limits_in_the_keys_file(keys):
    assert read_keys(keys)[b"secret-b"] == Key("bob", 1.0, 50.0)


@pytest.mark.parametrize("option", ["requests_per_minute=0", "requests_per_minute=-1", "tokens=5", "fast", "x="])
def test_a_wrong_limit_in_the_keys_file_is_refused(tmp_path, option):
    path = tmp_path / "keys"
    path.write_text(f"alice:secret {option}\n")
    with pytest.raises(SettingsError, match=":1: expected requests_per_minute=N"):
        read_keys(path)
