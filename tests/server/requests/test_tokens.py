"""The tokens that requests ask for are counted from their first generation to their end, and bound what waits."""

import asyncio
from types import SimpleNamespace

import httpx2
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from vllm import SamplingParams

from server.admission import Admission
from server.engine.generation import TooManyTokens, guard_generation
from server.errors import Refusal
from server.requests.costs import bounds_answer
from server.requests.tokens import CACHES, UNSAID, TokenQueue, refuse_tokens, reserve


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_prompt_and_choices_are_counted_until_the_request_ends():
    queue = TokenQueue(100, 50)
    with queue.request(bounded=True):
        end = reserve(40, 30, 3)
        assert queue.inside == 130
        assert sample("shoal_admission_queued_tokens") == 30
        end()
        assert queue.inside == 130
    assert queue.inside == sample("shoal_admission_queued_tokens") == 0


def test_what_does_not_fit_beside_others_is_refused_and_alone_let_in():
    queue = TokenQueue(100, 50)
    refused = sample("shoal_admission_rejected_total", reason="token_queue_full")
    with queue.request(bounded=True):
        reserve(1000, 1000, 2)  # alone: or it never would be
        with queue.request(bounded=True), pytest.raises(Refusal, match="asks for 3 tokens, and 3000 are") as refusal:
            reserve(2, 1, 1)
        assert (refusal.value.status, refusal.value.code) == (429, "token_queue_full")
        assert queue.inside == 3000
    assert sample("shoal_admission_rejected_total", reason="token_queue_full") == refused + 1
    with queue.request(bounded=True):
        reserve(10, 90, 1)
        with queue.request(bounded=True):
            reserve(10, 40, 1)
            with queue.request(bounded=True), pytest.raises(Refusal):
                reserve(1, 0, 1)


def test_the_prompts_of_one_request_are_refused_together_and_leave_nothing_behind():
    queue = TokenQueue(100, 0)
    with queue.request(bounded=True):
        reserve(50, 0, 1)
        with queue.request(bounded=True):
            reserve(30, 0, 1)
            with pytest.raises(Refusal):
                reserve(30, 0, 1)
        assert queue.inside == 50


def test_generations_one_after_another_count_once_and_are_never_refused_midway():
    queue = TokenQueue(100, 0)
    with queue.request(bounded=True):
        reserve(60, 0, 1)
        with queue.request(bounded=True):
            for step in range(20):  # a beam grows by a token a step
                end = reserve(30 + step, 1, 1)
                end()
            assert queue.inside == 60 + 50


def test_an_answer_without_a_bound_counts_as_a_usual_one():
    queue = TokenQueue(100, None)
    assert queue.limit == 100 * (1 + CACHES)
    with queue.request(bounded=False):
        reserve(10, 100_000, 2)
        assert queue.inside == 10 + 2 * UNSAID


@pytest.mark.parametrize(
    ("body", "bounded"),
    [
        ({"max_tokens": 5}, True), ({"max_completion_tokens": 5}, True), ({"max_output_tokens": 5}, True),
        ({"sampling_params": {"max_tokens": 5}}, True), ({"max_tokens": None}, False), ({}, False), ([], False),
    ],
)  # fmt: skip
def test_who_bounds_an_answer(body, bounded):
    assert bounds_answer(body) is bounded


def test_without_a_cache_or_outside_of_a_request_nothing_is_counted():
    assert reserve(10, 10, 1) is None
    queue = TokenQueue(0, 0)
    with queue.request(bounded=True):
        reserve(10, 10, 1)
        with queue.request(bounded=True):
            reserve(10**6, 10, 1)


class Engine:
    """Writes one token when it is told to."""

    model_config = SimpleNamespace(max_model_len=100)

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def generate(self, prompt, sampling_params, request_id):
        await self.go.wait()
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1], finish_reason=None)])


def test_a_request_over_the_limit_gets_429_and_when_to_come_again():
    engine, queue = Engine(), TokenQueue(100, 20)
    guard_generation(engine, None, None, lambda: None, reserve)

    async def complete(request: Request) -> JSONResponse:
        wanted = await request.json()
        parameters = SamplingParams(n=wanted.get("n", 1), max_tokens=wanted.get("max_tokens", 90))
        pieces = engine.generate({"prompt_token_ids": [1] * 10}, parameters, "id")
        return JSONResponse([len(piece.outputs) async for piece in pieces])

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    app.add_exception_handler(TooManyTokens, refuse_tokens)
    guard = Admission(app, 10, 10, 1000, 1.5, tokens=queue)

    async def trial():
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=guard), base_url="http://here")

        async def ask(**fields):
            return await http.post("/v1/completions", json=fields)

        first = asyncio.create_task(ask())
        while queue.inside != 100:
            await asyncio.sleep(0.01)
        refused, fits = await ask(max_tokens=11), asyncio.create_task(ask(max_tokens=5, n=2))
        while queue.inside != 120:
            await asyncio.sleep(0.01)
        engine.go.set()
        return refused, await first, await fits

    refused, *answered = asyncio.run(trial())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert refused.json()["error"]["code"] == "token_queue_full"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [answer.json() for answer in answered] == [[1], [1]]
    assert queue.inside == 0
    assert guard.inside == 0
