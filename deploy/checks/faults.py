"""Do to a real server what the world does: clients that vanish, a stop under load, an engine that is killed.

`python deploy/checks/faults.py DIR`, where DIR is a checkpoint; about five minutes on two cores. Three trials:

1. 200 streams at once, every second one cut off by its client midway. Afterwards no request runs, the KV cache is as
   empty as before, no task is left, and a request takes as long as before.
2. SIGTERM with streams running: all of them come whole, what is new is refused, the exit code is 0.
3. SIGKILL to the engine with streams and whole requests open: each one is told, and the process ends with 1; once
   with one API process, once with two.

Prints a JSON object a trial; exit code 1 when a trial fails. Needs aiohttp and psutil, which vLLM brings.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

NO_LIMIT = aiohttp.ClientTimeout(total=300)


class Server:
    """A running `prune-serve`."""

    def __init__(self, checkpoint: Path, log: Path, *engine: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.model, self.log = f"http://127.0.0.1:{self.port}", checkpoint.name, log
        self.command = [
            str(Path(sys.executable).with_name("prune-serve")), str(checkpoint), "--port", str(self.port), "--",
            "--max-model-len", "512", "--max-num-seqs", "64", *engine,
        ]  # fmt: skip

    async def start(self, http: aiohttp.ClientSession) -> None:
        """Start it and wait until it is ready."""
        with self.log.open("w") as stream:
            self.process = await asyncio.create_subprocess_exec(*self.command, stdout=stream, stderr=stream)
        while True:
            if self.process.returncode is not None:
                raise RuntimeError(self.log.read_text()[-3000:])
            try:
                async with http.get(f"{self.url}/health/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)

    def engines(self) -> list[psutil.Process]:
        """Its engine processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "EngineCore" in "".join(child.cmdline()[:1])]

    async def sample(self, http: aiohttp.ClientSession, name: str) -> float:
        """Sum of a metric over its labels."""
        async with http.get(f"{self.url}/metrics") as answer:
            lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", await answer.text(), re.MULTILINE)
        return sum(map(float, lines))


async def ask(server: Server, http: aiohttp.ClientSession, tokens: int, number: int = 0, cut: int | None = None) -> str:
    """Stream a completion; leave after `cut` pieces. Gives what became of it: whole, left, told or broken."""
    body = {
        "model": server.model, "prompt": f"{number}: once upon a time", "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    used, seen, last = 0, 0, ""
    try:
        async with http.post(f"{server.url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return f"status {answer.status}"
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                last = line.decode()
                seen += 1
                if cut is not None and seen >= cut:
                    return "left"
                if "completion_tokens" in last:
                    used = json.loads(last[6:])["usage"]["completion_tokens"]
                if '"error"' in last:
                    return "told"
    except aiohttp.ClientError as error:
        return f"broken: {type(error).__name__}"
    return "whole" if used == tokens and "[DONE]" in last else "broken: no end"


async def ask_whole(server: Server, http: aiohttp.ClientSession, tokens: int) -> str:
    """The same without streaming."""
    body = {"model": server.model, "prompt": "once", "max_tokens": tokens, "ignore_eos": True}
    try:
        async with http.post(f"{server.url}/v1/completions", json=body) as answer:
            return "told" if "error" in await answer.json() else "whole"
    except (aiohttp.ClientError, ValueError) as error:
        return f"broken: {type(error).__name__}"


async def latency(server: Server, http: aiohttp.ClientSession) -> float:
    """Median seconds of five requests for 16 tokens, one after the other."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        assert await ask(server, http, 16) == "whole"
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


async def until(truth: Callable[[], Awaitable[bool]], seconds: float) -> float:
    """Seconds until it is true; infinite if it is not in time."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        if await truth():
            return time.monotonic() - begun
        await asyncio.sleep(0.05)
    return float("inf")


async def cut_off(server: Server, http: aiohttp.ClientSession, streams: int) -> dict[str, Any]:
    """Trial 1."""
    await latency(server, http)
    before = await latency(server, http)
    tasks = await server.sample(http, "shoal_event_loop_tasks")

    # Each stream has its own connection: closing it is how a client goes away.
    async def one(number: int) -> str:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=NO_LIMIT, connector=connector, headers=http.headers) as own:
            return await ask(server, own, 24, number, cut=8 if number % 2 else None)

    running = [asyncio.create_task(one(number)) for number in range(streams)]
    fullest = 0.0
    while not all(task.done() for task in running):
        fullest = max(fullest, await server.sample(http, "vllm:kv_cache_usage_perc"))
        await asyncio.sleep(0.2)
    ends = [task.result() for task in running]

    async def empty() -> bool:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return sum([await server.sample(http, name) for name in names]) == 0

    seconds = await until(empty, 20)
    after_tasks = await server.sample(http, "shoal_event_loop_tasks")
    after = await latency(server, http)
    return {
        "streams": streams, "whole": ends.count("whole"), "cut_off": ends.count("left"),
        "kv_cache_usage_at_most": fullest, "seconds_until_empty": round(seconds, 2),
        "tasks_before": tasks, "tasks_after": after_tasks,
        "seconds_of_a_request_before": round(before, 4), "seconds_of_a_request_after": round(after, 4),
        "passed": ends.count("whole") == streams // 2 and ends.count("left") == streams // 2 and seconds < 20
        and after_tasks <= tasks + 1 and after < 1.25 * before,
    }  # fmt: skip


async def stop(server: Server, http: aiohttp.ClientSession, streams: int) -> dict[str, Any]:
    """Trial 2."""
    running = [asyncio.create_task(ask(server, http, 60 + number, number)) for number in range(streams)]

    async def all_run() -> bool:
        return await server.sample(http, "shoal_time_to_first_token_seconds_count") - already >= streams

    already = await server.sample(http, "shoal_time_to_first_token_seconds_count")
    await until(all_run, 60)
    server.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    await asyncio.sleep(0.3)
    late = await ask(server, http, 1)
    ends = [await task for task in running]
    code = await asyncio.wait_for(server.process.wait(), 60)
    return {
        "streams": streams, "whole": ends.count("whole"), "broken": streams - ends.count("whole"), "late": late,
        "exit_code": code, "seconds_to_exit": round(time.monotonic() - begun, 2),
        "passed": ends.count("whole") == streams and late == "status 503" and code == 0,
    }  # fmt: skip


async def kill(server: Server, http: aiohttp.ClientSession, requests: int) -> dict[str, Any]:
    """Trial 3."""
    half = requests // 2
    running = [asyncio.create_task(ask(server, http, 400, number)) for number in range(half)]
    running += [asyncio.create_task(ask_whole(server, http, 400)) for _ in range(half)]
    await asyncio.sleep(3)
    for engine in server.engines():
        os.kill(engine.pid, signal.SIGKILL)
    begun = time.monotonic()
    ends = [await task for task in running]
    told = time.monotonic() - begun
    code = await asyncio.wait_for(server.process.wait(), 60)
    seconds = time.monotonic() - begun
    return {
        "requests": requests, "told": ends.count("told"), "others": [end for end in ends if end != "told"],
        "seconds_until_all_told": round(told, 2), "exit_code": code, "seconds_to_exit": round(seconds, 2),
        "passed": ends.count("told") == requests and code == 1 and seconds < 10,
    }  # fmt: skip


async def trials(checkpoint: Path, place: Path) -> bool:
    """All of them; each prints its result as it ends."""
    passed = []

    def note(name: str, result: dict[str, Any]) -> None:
        passed.append(result["passed"])
        print(json.dumps({name: result}), flush=True)

    async with aiohttp.ClientSession(timeout=NO_LIMIT, connector=aiohttp.TCPConnector(limit=0)) as http:
        first = Server(checkpoint, place / "first")
        await first.start(http)
        note("clients_that_vanish", await cut_off(first, http, 200))
        note("sigterm_under_load", await stop(first, http, 30))
        for processes in ("1", "2"):
            server = Server(checkpoint, place / processes, "--api-server-count", processes)
            await server.start(http)
            note(f"engine_killed_api_processes_{processes}", await kill(server, http, 20))
    return all(passed)


def main() -> int:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    with tempfile.TemporaryDirectory() as place:
        return int(not asyncio.run(trials(parser.parse_args().checkpoint.resolve(), Path(place))))


if __name__ == "__main__":
    sys.exit(main())
