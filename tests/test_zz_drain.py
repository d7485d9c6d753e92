"""Last of all: the end of the session's server, with streams running."""

import asyncio
import signal
import time

import openai
import pytest

pytestmark = pytest.mark.engine
STREAMS = 20


async def stream(client: openai.AsyncOpenAI, model: str, number: int, started: asyncio.Event) -> int:
    tokens = 40 + 5 * number
    pieces = await client.completions.create(
        model=model, prompt=f"{number} fish", max_tokens=tokens, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    used = 0
    async for piece in pieces:
        started.set()
        used = piece.usage.completion_tokens if piece.usage else used
    assert used == tokens
    return used


async def drain(server) -> list[int | BaseException]:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    events = [asyncio.Event() for _ in range(STREAMS)]
    running = [asyncio.create_task(stream(client, server.model, i, e)) for i, e in enumerate(events)]
    await asyncio.gather(*(event.wait() for event in events))
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    refused = await client._client.get(f"{server.url}/health/ready")
    assert (refused.status_code, refused.json()) == (503, {"status": "draining"})
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as late:
        await client.completions.create(model=server.model, prompt="late", max_tokens=1)
    assert late.value.response.headers["retry-after"]
    return await asyncio.gather(*running, return_exceptions=True)


def test_sigterm_lets_every_stream_finish_refuses_what_is_new_and_exits_0(live_server):
    results = asyncio.run(drain(live_server))
    assert [result for result in results if isinstance(result, BaseException)] == []
    started = time.monotonic()
    assert live_server.process.wait(60) == 0
    assert time.monotonic() - started < 30
