"""Mixed traffic on a server for as long as asked, with a killed engine and a drain on the way.

python benchmarks/soak.py --minutes 60 --clients 2 --output benchmarks/results/soak.json DENSE --plan DIR \
    --tool-call-parser hermes
python benchmarks/soak.py --minutes 3 CHECKPOINT --tool-call-parser hermes -- --max-model-len 4096

What comes after the options goes to `prune-serve`; requests with tools need a parser. The server lives three times, a
third of the minutes each. Its first life ends with SIGKILL to the engine, the second with SIGTERM, both while requests
run; it is started again as a supervisor would. The last ends with no request running.

Fails, with exit code 1, unless:
- outside of the two ends every request got the answer that its kind asks for, none of them a 5xx;
- at the kill every open request was told, or saw its connection break; at the SIGTERM every open request was finished;
- each request that was hit was answered when it was sent again, and greedy answers are the same in all three lives;
- exit codes are 1, 0, 0;
- at the end nothing runs, every block of the KV cache is free, and no more tasks are left than at the beginning;
- memory of all processes is flat: in the last quarter of a life at most GROWTH above the second quarter.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from machine import machine
from traffic import MIX, Client, End, greedy, pause

GROWTH = 0.03  # of resident memory; the allocator's own ups and downs stay below
SAMPLE_SECONDS = 2.0
ENDS = ("engine killed", "drained", "idle, then drained")
CODES = (1, 0, 0)
TASKS = "shoal_event_loop_tasks"
TIMEOUT = aiohttp.ClientTimeout(total=300)


@dataclass
class Life:
    """From one start of the server to its end.

    Attributes:
        memory: Resident bytes of all its processes, one a sample, from the first request on.
        seconds: Of serving.
        code: Exit code.
        greedy: Answers without chance, at its start.
        tasks: asyncio tasks of the API process at its start.
        open: What became of the requests that were open when it ended.
    """

    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0
    code: int | None = None
    greedy: list[str] = field(default_factory=list)
    tasks: float = 0.0
    open: Counter[str] = field(default_factory=Counter)


class Server:
    """A `prune-serve` that is started again and again on one port."""

    def __init__(self, words: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log, self.model = f"http://127.0.0.1:{port}", log, ""
        cut = words.index("--") if "--" in words else len(words)
        own = [*words[:cut], "--port", str(port), "--log-format", "json"]
        self.command = [str(Path(sys.executable).with_name("prune-serve")), *own, *words[cut:]]
        self.up = asyncio.Event()

    async def start(self) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("a") as stream:
            self.process = await asyncio.create_subprocess_exec(*self.command, stdout=stream, stderr=stream)
        async with aiohttp.ClientSession() as http:
            while True:
                if self.process.returncode is not None:
                    raise SystemExit(self.log.read_text()[-3000:])
                try:
                    async with http.get(f"{self.url}/health/ready") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.5)
            async with http.get(f"{self.url}/v1/models") as answer:
                self.model = (await answer.json())["data"][0]["id"]

    def processes(self) -> list[psutil.Process]:
        """The server's and its engine's."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def memory(self) -> int:
        """Resident bytes of all of them."""
        total = 0
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def kill_engine(self) -> None:
        """As the kernel does when memory is short."""
        for process in self.processes():
            if "EngineCore" in "".join(process.cmdline()[:1]):
                os.kill(process.pid, signal.SIGKILL)

    async def samples(self) -> dict[str, float]:
        """What the last look at the metrics is about, each summed over its labels."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "vllm:num_preemptions_total", TASKS, "shoal_admission_queue_depth")  # fmt: skip
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        return {name: sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))) for name in names}


class Soak:
    """Clients that ask until it is over, and the three lives of their server."""

    def __init__(self, server: Server, clients: int, think: float, long: int) -> None:
        self.server, self.clients, self.think, self.long = server, clients, think, long
        self.lives: list[Life] = []
        self.ending = False  # requests that are open now are not to be judged as usual
        self.over = False
        self.open = 0
        self.seconds: dict[str, list[float]] = {}
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self.resent = self.lost = 0

    async def client(self, index: int) -> None:
        """One request after another; one that an end of the server hit is sent again."""
        chance = random.Random(index)
        async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
            while not self.over:
                for kind in chance.sample(MIX, len(MIX)):
                    await self.server.up.wait()
                    if self.over:
                        return
                    asker = Client(self.server.url, self.server.model, chance, self.long)
                    await self.until_answered(asker, http, kind)
                    await pause(chance, self.think)

    async def until_answered(self, asker: Client, http: aiohttp.ClientSession, kind: str) -> None:
        """Send one request until it has its answer; more than once only when the server ended under it."""
        for attempt in range(3):
            life, begun = self.lives[-1], time.monotonic()
            before = self.ending
            self.open += 1
            end = await asker.ask(http, kind)
            self.open -= 1
            hit = self.ending or life is not self.lives[-1]
            if hit and not before:
                life.open[end.word] += 1
            if end.word == "ok":
                self.seconds.setdefault(kind, []).append(time.monotonic() - begun)
                self.statuses[end.status] += 1
                return
            if not hit or end.word not in ("refused", "told", "broken"):
                self.note(kind, end, attempt)
                return
            self.resent += 1
            await asyncio.sleep(0.5)
            await self.server.up.wait()
        self.lost += 1

    def note(self, kind: str, end: End, attempt: int) -> None:
        self.statuses[end.status] += 1
        self.failures.append(f"{kind}: {end.word} {end.status} {end.detail} (attempt {attempt + 1})")
        print(f"not as asked for: {self.failures[-1]}", flush=True)

    async def live(self, seconds: float, how: str) -> Life:
        """One life of the server."""
        await self.server.start()
        life = Life(greedy=await greedy(self.server.url, self.server.model))
        life.tasks = (await self.server.samples())[TASKS]
        self.lives.append(life)
        self.ending = False
        self.server.up.set()
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            await asyncio.sleep(SAMPLE_SECONDS)
            life.memory.append(self.server.memory())
        if how == ENDS[2]:
            return life
        while self.open < min(self.clients, 2):  # an end that nobody notices proves nothing
            await asyncio.sleep(0.01)
        self.server.up.clear()
        self.ending = True
        life.seconds = time.monotonic() - began
        if how == ENDS[0]:
            self.server.kill_engine()
        else:
            self.server.process.send_signal(signal.SIGTERM)
        life.code = await asyncio.wait_for(self.server.process.wait(), 90)
        while self.open:
            await asyncio.sleep(0.1)
        return life

    async def run(self, minutes: float) -> dict[str, Any]:
        """All three lives; gives what is written down."""
        asking = None
        for how in ENDS:
            living = asyncio.create_task(self.live(60 * minutes / len(ENDS), how))
            if asking is None:
                asking = asyncio.gather(*map(self.client, range(self.clients)))
            await asyncio.wait((living, asking), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():  # a client's fault: nobody asks any more
                asking.result()
            last = await living
            print(f"{how}: {sum(map(len, self.seconds.values()))} answered, {len(self.failures)} wrong", flush=True)
        self.over = True
        last.seconds = 60 * minutes / len(ENDS)
        assert asking is not None
        await asking
        await asyncio.sleep(2)
        at_end = await self.server.samples()
        self.server.process.send_signal(signal.SIGTERM)
        last.code = await asyncio.wait_for(self.server.process.wait(), 90)
        return self.report(at_end) | {"minutes": minutes, "clients": self.clients}

    def report(self, at_end: dict[str, float]) -> dict[str, Any]:
        """In numbers."""
        lives = [
            {
                "end": how, "seconds": round(life.seconds), "exit_code": life.code, "open_at_end": dict(life.open),
                "memory_mib": {k: round(v / 2**20) for k, v in quarters(life.memory).items()},
                "tasks_at_start": life.tasks,
                "growth": round(growth(life.memory), 4), "greedy_as_at_first": life.greedy == self.lives[0].greedy,
            }
            for how, life in zip(ENDS, self.lives, strict=True)
        ]  # fmt: skip
        kinds = [
            {
                "kind": kind, "answered": len(took), "p50_seconds": round(statistics.median(took), 2),
                "longest_seconds": round(max(took), 2),
            }
            for kind, took in sorted(self.seconds.items())
        ]  # fmt: skip
        return {
            "requests": sum(one["answered"] for one in kinds) + len(self.failures) + self.lost,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "sent_again": self.resent, "lost": self.lost, "failures": self.failures, "at_end": at_end,
            "lives": lives, "kinds": kinds,
        }  # fmt: skip


def quarters(memory: list[int]) -> dict[str, float]:
    """Bytes after the first quarter, in the last one, and at most."""
    size = max(1, len(memory) // 4)
    return {
        "second_quarter": statistics.mean(memory[size : 2 * size] or memory),
        "last_quarter": statistics.mean(memory[-size:]),
        "most": max(memory),
    }


def growth(memory: list[int]) -> float:
    """By what share the last quarter is above the second; the first holds what is made once."""
    parts = quarters(memory)
    return parts["last_quarter"] / parts["second_quarter"] - 1


def faults(report: dict[str, Any]) -> list[str]:
    """What is not as it must be, a sentence each."""
    found = [f"not as asked for: {failure}" for failure in report["failures"]]
    if report["lost"]:
        found.append(f"{report['lost']} requests were never answered")
    for number, life in enumerate(report["lives"]):
        if life["exit_code"] != CODES[number]:
            found.append(f"{life['end']}: exit code {life['exit_code']}")
        if life["growth"] > GROWTH:
            found.append(f"{life['end']}: memory grew by {life['growth']:.1%}")
        if not life["greedy_as_at_first"]:
            found.append(f"{life['end']}: greedy answers are others than in the first life")
    killed, drained, last = report["lives"]
    if not killed["open_at_end"]:
        found.append("no request was open when the engine was killed")
    if set(drained["open_at_end"]) - {"refused"} != {"ok"}:  # refused: it came after the signal
        found.append(f"of the requests that were open at the SIGTERM: {drained['open_at_end']}")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
                 "shoal_admission_queue_depth"):  # fmt: skip
        if report["at_end"][name]:
            found.append(f"{name} is {report['at_end'][name]} at the end")
    if report["at_end"][TASKS] > last["tasks_at_start"] + 2:
        found.append(f"{report['at_end'][TASKS]:.0f} tasks at the end, {last['tasks_at_start']:.0f} at the start")
    return found


def table(report: dict[str, Any]) -> str:
    """For people."""
    lines = ["| kind | answered | p50 s | longest s |", "|---|---|---|---|"]
    lines += [
        f"| {one['kind']} | {one['answered']} | {one['p50_seconds']:.2f} | {one['longest_seconds']:.2f} |"
        for one in report["kinds"]
    ]
    lines += ["", "| life | s | MiB in the 2nd quarter | last quarter | most | open at its end | exit code |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for life in report["lives"]:
        memory = life["memory_mib"]
        ends = ", ".join(f"{count} {word}" for word, count in life["open_at_end"].items()) or "none"
        lines.append(
            f"| {life['end']} | {life['seconds']} | {memory['second_quarter']} | {memory['last_quarter']} "
            f"| {memory['most']} | {ends} | {life['exit_code']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--think", type=float, default=0.5, help="longest pause of a client between requests, seconds")
    parser.add_argument("--long", type=int, default=2000, help="words of a long prompt")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("serve", nargs=argparse.REMAINDER, help="DIR and whatever else prune-serve is to get")
    options = parser.parse_args()
    if not options.serve:
        parser.error("say what to serve")
    with tempfile.TemporaryDirectory() as place:
        log = Path(place, "log")
        soak = Soak(Server(options.serve, log), options.clients, options.think, options.long)
        report = asyncio.run(soak.run(options.minutes))
        problems = faults(report)
        if problems:
            print(log.read_text()[-3000:])
    print(table(report), json.dumps({k: report[k] for k in ("requests", "statuses", "sent_again", "lost", "at_end")}),
          *problems, sep="\n")  # fmt: skip
    if options.output:
        document = {"machine": machine(), "faults": problems, **report}
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
