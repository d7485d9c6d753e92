"""Two replicas behind nginx under load: one is killed, then both are restarted in turn; Prometheus watches.

`python deploy/checks/rolling.py DIR [--serve .venv/bin/prune-serve]`: needs nginx, prometheus, prometheus-alertmanager
and aiohttp, and the ports 8001, 8002, 8080, 9090 and 9093. Prints one JSON object; exit code 1 when a request was lost,
a stream was refused in the rolling restart, a stream of a replica that was not killed broke, or the alert did not
arrive.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from load import Load, Outcome, served_model
from monitoring import alert_arrives, series, wait_for

DEPLOY = Path(__file__).resolve().parents[1]
PORTS = (8001, 8002)
Process = subprocess.Popen[bytes]


class Stage:
    """The processes of the check."""

    def __init__(self, checkpoint: Path, serve: str, folder: Path) -> None:
        self.checkpoint, self.serve, self.folder = checkpoint, shlex.split(serve), folder
        self.replicas: dict[int, Process] = {}
        self.others: list[Process] = []

    def start(self, name: str, *command: str, **environment: str) -> Process:
        """Start a program with its output in a file."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, env=os.environ | environment
            )

    def replica(self, port: int) -> None:
        """Start a replica."""
        flags = ["--port", str(port), "--", "--max-model-len", "1024"]
        # Left alone, vLLM binds the threads of both replicas to the same first core, and one starves the other.
        core = str(PORTS.index(port) % (os.cpu_count() or 1))
        self.replicas[port] = self.start(
            f"replica-{port}", *self.serve, str(self.checkpoint), *flags, VLLM_CPU_OMP_THREADS_BIND=core
        )

    def around(self) -> None:
        """Start nginx, Prometheus and Alertmanager on our own files, with the addresses of this machine."""
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        head, _, _ = text.partition("scrape_configs:")
        targets = ", ".join(f'"127.0.0.1:{port}"' for port in PORTS)
        head = head.replace("alertmanager:9093", "127.0.0.1:9093")
        scrape = f"scrape_configs:\n  - job_name: shoal\n    static_configs:\n      - targets: [{targets}]\n"
        (self.folder / "prometheus.yml").write_text(head + scrape)
        (self.folder / "rules.yml").write_text((DEPLOY / "prometheus" / "rules.yml").read_text())
        (self.folder / "nginx").mkdir()
        data, here = str(self.folder / "data"), "127.0.0.1"
        self.others = [
            self.start("nginx", "nginx", "-p", str(self.folder / "nginx"), "-c", str(DEPLOY / "nginx" / "nginx.conf"),
                       "-g", "daemon off;"),
            self.start("prometheus", "prometheus", "--config.file=prometheus.yml", f"--storage.tsdb.path={data}",
                       f"--web.listen-address={here}:9090"),
            self.start("alertmanager", "prometheus-alertmanager", "--cluster.listen-address=",
                       f"--config.file={DEPLOY / 'prometheus' / 'alertmanager.yml'}",
                       f"--storage.path={self.folder / 'alerts'}", f"--web.listen-address={here}:9093"),
        ]  # fmt: skip

    def end(self) -> None:
        """Stop everything that was started here."""
        for process in (*self.others, *self.replicas.values()):
            if process.poll() is None:
                process.terminate()
        for process in (*self.others, *self.replicas.values()):
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def phase(model: str, workers: int, act: Any) -> tuple[Outcome, Any]:
    """Load while something happens."""
    load = Load("http://127.0.0.1:8080", model)
    running = asyncio.create_task(load.run(workers))
    await asyncio.sleep(5)
    result = await act()
    await asyncio.sleep(3)
    load.stop.set()
    return await running, result


async def check(stage: Stage, workers: int, kill_first: bool) -> dict[str, Any]:
    """All phases; returns the report."""
    for port in PORTS:
        stage.replica(port)
    stage.around()
    ready = [await asyncio.to_thread(wait_for, f"http://127.0.0.1:{port}/health/ready") for port in PORTS]
    model = await served_model("http://127.0.0.1:8080")

    async def kill() -> Any:
        os.killpg(stage.replicas[8001].pid, signal.SIGKILL)
        return await asyncio.to_thread(alert_arrives, "ShoalDown", 100)

    async def roll() -> Any:
        codes, seconds = [], []
        for port in PORTS:
            stage.replicas[port].terminate()
            codes.append(await asyncio.to_thread(stage.replicas[port].wait, 60))
            stage.replica(port)
            seconds.append(await asyncio.to_thread(wait_for, f"http://127.0.0.1:{port}/health/ready"))
            # As `minReadySeconds`: nginx needs up to 2 s to take back a replica that refused while it started.
            await asyncio.sleep(5)
        return codes, seconds

    killed, alert = Outcome(), None
    if kill_first:
        killed, alert = await phase(model, workers, kill)
        first = {"seconds_to_ready": ready, "alert": alert, "killed": killed.summary()}
        print(json.dumps(first), file=sys.stderr, flush=True)
        stage.replica(8001)
        await asyncio.to_thread(wait_for, "http://127.0.0.1:8001/health/ready")
    await asyncio.sleep(6)
    scraped = await asyncio.to_thread(series, "shoal_.+", "vllm:.+", "up")
    rolled, (codes, restarts) = await phase(model, workers, roll)
    return {
        "seconds_to_ready": ready, "series": scraped, "alert": alert, "killed": killed.summary(),
        "rolling": rolled.summary(), "exit_codes": codes, "seconds_to_ready_under_load": restarts,
    }  # fmt: skip


def main() -> int:
    """Run the check and judge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--serve", default=str(DEPLOY.parent / ".venv" / "bin" / "prune-serve"))
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--no-kill", action="store_true", help="only the rolling restart")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(flags.checkpoint.resolve(), flags.serve, Path(folder))
        try:
            report = asyncio.run(check(stage, flags.workers, not flags.no_kill))
        finally:
            stage.end()
    print(json.dumps(report, indent=1))
    killed, rolled = report["killed"], report["rolling"]
    blameless = killed["lost"] == rolled["lost"] == rolled["streams_broken"] == rolled["streams_refused"] == 0
    only_there = all(upstream.endswith("127.0.0.1:8001") for upstream in killed["broken_on"])
    told = report["alert"] or flags.no_kill
    return 0 if blameless and only_there and told and report["exit_codes"] == [0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
