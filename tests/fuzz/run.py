"""Send a real server requests that schemathesis makes from its OpenAPI document: no 5xx, no hang.

usage: run.py CHECKPOINT SCHEMATHESIS [REPORT [SECONDS]]; `make fuzz` gives the second. Prints, and writes to REPORT if
there is one, the number of requests by status, every 5xx and every request over 30 s; exit code 1 at one of these, or
when there were fewer than 2,000 requests.
"""

import json
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # before `tests`, where `pruning` is a directory of tests
from tests.conftest import serve  # noqa: E402

ENOUGH = 2000
TIMEOUT_SECONDS = 60
SLOW_SECONDS = 30
BUDGET_SECONDS = 240
# Routes that stop or change the server for everybody, or that have no engine to go to here.
LEFT_OUT = "^/(pause|resume|sleep|wake_up|scale_elastic_ep|is_scaling_elastic_ep|abort_requests|shutdown)"


def served(log: Path) -> list[dict]:
    """The server's own line of every request: method, path, status, seconds."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return [line for line in lines if line["name"] == "shoal.access"]


def main() -> int:
    checkpoint, program = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as place:
        flags = ["--log-format", "json", "--max-output-tokens", "8", "--max-prompt-tokens", "256"]
        with serve(
            checkpoint, Path(place, "log"), *flags, engine=["--max-model-len", "512"], start_seconds=1200
        ) as server:
            fuzzer = subprocess.Popen([
                program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--phases",
                "coverage,fuzzing", "--max-examples", "60", "--continue-on-failure", "--seed", "1", "--no-shrink",
                "--workers", "4", "--request-timeout", str(TIMEOUT_SECONDS), "--exclude-path-regex", LEFT_OUT,
                "--suppress-health-check", "all",
            ])  # fmt: skip
            try:
                fuzzer.wait(int(sys.argv[4]) if len(sys.argv) > 4 else BUDGET_SECONDS)
            except subprocess.TimeoutExpired:  # it is not asked for every route to be as thorough as the first
                fuzzer.send_signal(signal.SIGINT)
                try:
                    fuzzer.wait(60)
                except subprocess.TimeoutExpired:  # busy with its own report, on a busy machine
                    fuzzer.kill()
            with urllib.request.urlopen(f"{server.url}/health/ready", timeout=10) as answer:
                alive = answer.status == 200
            seen = served(server.log)
    failed = [line for line in seen if line["status"] >= 500 or line["status"] == 0 or line["seconds"] > SLOW_SECONDS]
    report = {
        "requests": len(seen), "statuses": dict(sorted(Counter(line["status"] for line in seen).items())),
        "routes": dict(Counter(line["path"] for line in seen if line["status"] != 404).most_common()),
        "slowest_seconds": max(line["seconds"] for line in seen), "ready_afterwards": alive,
        "failed": [{key: line[key] for key in ("method", "path", "status", "request_id")} for line in failed],
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(failed) or len(seen) < ENOUGH or not alive)


if __name__ == "__main__":
    sys.exit(main())
