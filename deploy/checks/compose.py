"""Bring up the server, Prometheus and Alertmanager with Compose, see metrics arrive, and make an alert fire and end.

`python deploy/checks/compose.py [--checkpoint DIR] [--compose "docker compose"]`: needs a Docker engine, the image
`shoal:0.1.0` and the ports of the Compose file. With a checkpoint nothing is pruned: it is copied into the volume, and
the prune job finds it. Prints one JSON object, ends with 1 when a step fails, and removes everything it made.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from monitoring import alert_arrives, alert_ends, query, series

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "shoal-check"
SERVICES = ("server", "prometheus", "alertmanager")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program; its output is only shown when it fails."""
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done


def fill(checkpoint: Path) -> None:
    """Copy a checkpoint into the models volume, under the name the server serves and as the image's user."""
    volume = f"{PROJECT}_models"
    label = ["--label", f"com.docker.compose.project={PROJECT}", "--label", "com.docker.compose.volume=models"]
    run("docker", "volume", "create", *label, volume)
    into = ["-v", f"{volume}:/models", "-v", f"{checkpoint}:/from:ro", "--entrypoint", "cp"]
    run("docker", "run", "--rm", *into, "shoal:0.1.0", "-r", "/from", "/models/smollm2-135m-pruned")


def ask() -> str:
    """The answer to a question, through the published port."""
    body = {"model": "smollm2-135m-pruned", "temperature": 0, "max_tokens": 16,
            "messages": [{"role": "user", "content": "What is the capital of France?"}]}  # fmt: skip
    url, headers = "http://127.0.0.1:8000/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def check(compose: list[str]) -> dict[str, Any]:
    """All steps; returns the report."""
    report: dict[str, Any] = {}
    begun = time.monotonic()
    run(*compose, "up", "-d", "--wait", *SERVICES)
    report["seconds_to_healthy"] = round(time.monotonic() - begun, 1)
    report["services"] = {
        container["Service"]: f"{container['State']} {container['Health']}".strip()
        for container in map(json.loads, run(*compose, "ps", "-a", "--format", "json").stdout.splitlines())
    }
    report["answer"] = ask()
    time.sleep(12)
    report["series"] = series("shoal_.+", "vllm:.+", "up")
    report["generated_tokens"] = [float(s["value"][1]) for s in query("vllm:generation_tokens_total")]
    report["alerts_before"] = [s["metric"]["alertname"] for s in query('ALERTS{alertstate="firing"}')]
    run(*compose, "stop", "server")
    report["alert"] = alert_arrives("ShoalDown", 180)
    begun = time.monotonic()
    run(*compose, "up", "-d", "--wait", "server")
    report["seconds_to_healthy_again"] = round(time.monotonic() - begun, 1)
    report["alert_ends"] = alert_ends("ShoalDown", 400)
    return report


def main() -> int:
    """Run the check, judge it and tidy up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--compose", default="docker compose")
    parser.add_argument("--override", type=Path, action="append", default=[], help="further Compose files")
    flags = parser.parse_args()
    files = [part for file in (ROOT / "docker-compose.yml", *flags.override) for part in ("-f", str(file.resolve()))]
    compose = [*shlex.split(flags.compose), "-p", PROJECT, *files, "--profile", "cpu"]
    try:
        if flags.checkpoint:
            fill(flags.checkpoint.resolve())
        report = check(compose)
    finally:
        run(*compose, "down", "-v", "--timeout", "45")
    print(json.dumps(report, indent=1))
    scraped = all(report["series"].values()) and report["generated_tokens"] != []
    told = report["alert"] is not None and report["alert"]["receivers"] == ["pager"] and report["alert_ends"]
    return 0 if scraped and told and report["alerts_before"] == [] and "Paris" in report["answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
