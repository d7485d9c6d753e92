"""The verdict of a soak finds each thing that may go wrong, and its traffic tells right answers from others."""

import asyncio
import copy
import importlib.util
import random
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


traffic, soak = load("traffic"), load("soak")
LIFE = {"growth": 0.0, "greedy_as_at_first": True, "tasks_at_start": 7.0, "open_at_end": {}}
SOUND = {
    "failures": [], "lost": 0,
    "lives": [
        LIFE | {"end": "engine killed", "exit_code": 1, "open_at_end": {"told": 1, "broken": 1}},
        LIFE | {"end": "drained", "exit_code": 0, "open_at_end": {"ok": 2, "refused": 1}},
        LIFE | {"end": "idle, then drained", "exit_code": 0},
    ],
    "at_end": {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0,
               "shoal_admission_queue_depth": 0.0, "shoal_event_loop_tasks": 8.0},
}  # fmt: skip


def test_a_sound_run_has_no_faults():
    assert soak.faults(SOUND) == []


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (lambda r: r["failures"].append("chat: told 500"), "chat: told 500"),
        (lambda r: r.update(lost=1), "never answered"),
        (lambda r: r["lives"][0].update(exit_code=0), "engine killed: exit code 0"),
        (lambda r: r["lives"][1].update(growth=0.04), "memory grew by 4.0%"),
        (lambda r: r["lives"][2].update(greedy_as_at_first=False), "greedy answers"),
        (lambda r: r["lives"][0].update(open_at_end={}), "no request was open"),
        (lambda r: r["lives"][1].update(open_at_end={"ok": 1, "broken": 1}), "at the SIGTERM"),
        (lambda r: r["at_end"].update({"vllm:kv_cache_usage_perc": 0.1}), "kv_cache_usage_perc is 0.1"),
        (lambda r: r["at_end"].update(shoal_event_loop_tasks=12.0), "12 tasks at the end, 7 at the start"),
    ],
)
def test_each_fault_is_told(plant, told):
    report = copy.deepcopy(SOUND)
    plant(report)
    (found,) = soak.faults(report)
    assert told in found


def test_growth_leaves_the_first_quarter_out():
    assert soak.growth([1, 1, 100, 100, 101, 101, 110, 110]) == pytest.approx(0.1)


async def end_of(answer, kind):
    """How a request of a kind ends at a server with this answer."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        async with aiohttp.ClientSession() as http:
            return (await traffic.Client(f"http://127.0.0.1:{port}", "m", random.Random(0), 10).ask(http, kind)).word
    finally:
        await runner.cleanup()


def stream(*pieces, whole=True):
    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(f"data: {piece}\n\n".encode())
        if not whole:
            request.transport.abort()
        return response

    return answer


def status(code, body=None):
    async def answer(request):
        return web.json_response(body or {"error": {"message": "no"}}, status=code)

    return answer


@pytest.mark.parametrize(
    ("answer", "kind", "word"),
    [
        (stream('{"choices": []}', "[DONE]"), "stream", "silent"),  # fewer tokens than asked for
        (stream('{"choices": []}'), "stream", "silent"),
        (stream('{"choices": []}', whole=False), "stream", "broken"),
        (stream('{"error": {"message": "dead"}}'), "stream", "told"),
        (stream(*['{"choices": []}'] * 20, "[DONE]"), "stream cut by the client", "ok"),
        (status(500), "chat", "told"),
        (status(503), "chat", "refused"),
        (status(404), "chat", "wrong"),
        (status(200, {"usage": {"completion_tokens": 1}, "choices": [{"finish_reason": "stop"}]}), "chat", "silent"),
        (status(200, {"choices": [{"finish_reason": "stop", "message": {"content": "[1]"}}]}), "grammar", "wrong"),
        (status(200, {"choices": []}), "grammar", "wrong"),
        (status(500), "wrong", "told"),
        (status(418), "wrong", "wrong"),
    ],
)  # fmt: skip
def test_traffic_tells_right_answers_from_others(answer, kind, word):
    assert asyncio.run(end_of(answer, kind)) == word
