"""Closed-loop load on an OpenAI endpoint, and what became of every request: `python load.py URL --seconds 60`.

Half of the workers stream, half do not. A request that does not stream is sent again when it gets no answer, 502, 503
or 504; it counts as lost when all attempts fail. A stream that has begun cannot be sent again: it counts as broken when
it ends without `[DONE]`, with the upstream that the balancer named in `X-Upstream`. Needs aiohttp.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

AGAIN = {502, 503, 504}


@dataclass
class Outcome:
    """Counts of a run; latencies are seconds of whole requests."""

    answered: int = 0
    retried: int = 0
    lost: int = 0
    streamed: int = 0
    streams_refused: int = 0
    broken: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    upstreams: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """What is printed."""
        ordered = sorted(self.seconds) or [0.0]
        return {
            "answered": self.answered, "retried": self.retried, "lost": self.lost, "streamed": self.streamed,
            "streams_refused": self.streams_refused, "streams_broken": len(self.broken),
            "broken_on": dict(Counter(self.broken)), "upstreams": dict(self.upstreams), "reasons": dict(self.reasons),
            "p50_seconds": round(ordered[len(ordered) // 2], 3),
            "p99_seconds": round(ordered[int(len(ordered) * 0.99)], 3),
        }  # fmt: skip


@dataclass
class Load:
    """Workers that ask until `stop` is set."""

    url: str
    model: str
    max_tokens: int = 32
    attempts: int = 8
    outcome: Outcome = field(default_factory=Outcome)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def body(self, number: int, stream: bool) -> dict[str, object]:
        """A request that always runs its full length."""
        prompt = f"Request {number}: once upon a time, in a quiet harbour town,"
        return {
            "model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, "ignore_eos": True, "stream": stream,
        }  # fmt: skip

    async def whole(self, session: aiohttp.ClientSession, number: int) -> None:
        """One request that does not stream, with retries."""
        for attempt in range(self.attempts):
            try:
                async with session.post(f"{self.url}/v1/completions", json=self.body(number, False)) as answer:
                    upstream = answer.headers.get("X-Upstream", "")
                    if answer.status == 200 and (await answer.json())["usage"]["completion_tokens"] == self.max_tokens:
                        self.outcome.answered += 1
                        self.outcome.upstreams[upstream] += 1
                        return
                    self.outcome.reasons[f"status {answer.status}"] += 1
                    if answer.status not in AGAIN:
                        break
            except (aiohttp.ClientError, TimeoutError) as error:
                self.outcome.reasons[type(error).__name__] += 1
            self.outcome.retried += 1
            await asyncio.sleep(min(0.25 * 2**attempt, 2))
        self.outcome.lost += 1

    async def streamed(self, session: aiohttp.ClientSession, number: int) -> None:
        """One stream; not repeated once it has begun."""
        upstream, done = "", False
        try:
            async with session.post(f"{self.url}/v1/completions", json=self.body(number, True)) as answer:
                upstream = answer.headers.get("X-Upstream", "")
                if answer.status != 200:
                    self.outcome.streams_refused += 1
                    self.outcome.reasons[f"stream status {answer.status}"] += 1
                    await asyncio.sleep(0.25)
                    return
                async for line in answer.content:
                    done = done or line.strip() == b"data: [DONE]"
        except (aiohttp.ClientError, TimeoutError) as error:
            self.outcome.reasons[f"stream {type(error).__name__}"] += 1
        if done:
            self.outcome.streamed += 1
            self.outcome.upstreams[upstream] += 1
        else:
            self.outcome.broken.append(upstream)

    async def worker(self, session: aiohttp.ClientSession, index: int) -> None:
        """Ask again and again, one request at a time."""
        number = index
        while not self.stop.is_set():
            begun = time.monotonic()
            await (self.streamed if index % 2 else self.whole)(session, number)
            self.outcome.seconds.append(time.monotonic() - begun)
            number += 1000

    async def run(self, workers: int) -> Outcome:
        """Run until `stop` is set, and let open requests end."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self.worker(session, index) for index in range(workers)))
        return self.outcome


async def served_model(url: str, patience: float = 900) -> str:
    """Name of the served model, once the server answers."""
    deadline = time.monotonic() + patience
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/v1/models") as answer:
                    if answer.status == 200:
                        return str((await answer.json())["data"][0]["id"])
            except aiohttp.ClientError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not answer")
            await asyncio.sleep(1)


async def timed(url: str, seconds: float, workers: int) -> Outcome:
    """Load for a time."""
    load = Load(url, await served_model(url))
    asyncio.get_running_loop().call_later(seconds, load.stop.set)
    return await load.run(workers)


def main() -> None:
    """Print what became of the requests, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=4)
    flags = parser.parse_args()
    print(json.dumps(asyncio.run(timed(flags.url, flags.seconds, flags.workers)).summary(), indent=1))


if __name__ == "__main__":
    main()
