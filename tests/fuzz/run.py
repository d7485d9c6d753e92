"""Send a real server requests that schemathesis makes from its OpenAPI document: no 5xx, no hang.

usage: run.py CHECKPOINT SCHEMATHESIS [REPORT]; `make fuzz` gives the second. Prints the number of requests by status
and every 5xx, writes them to REPORT as JSON if there is one; exit code 1 at a 5xx or when there were too few requests.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from conftest import serve  # noqa: E402

ENOUGH = 2000
TIMEOUT_SECONDS = 60
# Routes that stop or change the server for everybody, or that have no engine to go to here.
LEFT_OUT = "^/(pause|resume|sleep|wake_up|scale_elastic_ep|is_scaling_elastic_ep|abort_requests|shutdown)"


def exchanges(report: Path) -> list[dict]:
    """Every request of a HAR report with its answer; status 0: none within the time."""
    found = []
    for entry in json.loads(report.read_text())["log"]["entries"]:
        request, response = entry["request"], entry["response"]
        found.append({
            "method": request["method"], "url": request["url"], "status": response["status"],
            "body": request.get("postData", {}).get("text", "")[:2000],
            "answer": response["content"].get("text", "")[:500], "milliseconds": entry["time"],
        })  # fmt: skip
    return found


def main() -> int:
    checkpoint, program = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as place:
        flags = ["--max-output-tokens", "8", "--max-prompt-tokens", "256"]
        with serve(checkpoint, Path(place, "log"), *flags, engine=["--max-model-len", "512"]) as server:
            har = Path(place, "report.har")
            subprocess.run([
                program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--phases",
                "examples,coverage,fuzzing", "--max-examples", "120", "--continue-on-failure", "--seed", "1",
                "--no-shrink", "--workers", "4", "--request-timeout", str(TIMEOUT_SECONDS),
                "--exclude-path-regex", LEFT_OUT,
                "--report-har-path", str(har), "--suppress-health-check", "all", "--max-time", "240",
            ], check=False)  # fmt: skip
            with urllib.request.urlopen(f"{server.url}/health/ready", timeout=10) as answer:
                alive = answer.status == 200
        seen = exchanges(har)
    statuses = Counter(one["status"] for one in seen)
    failed = [one for one in seen if one["status"] >= 500 or one["status"] == 0]
    print(f"{len(seen)} requests by status: {dict(sorted(statuses.items()))}")
    for one in failed:
        print(json.dumps(one))
    if len(sys.argv) > 3:
        routes = Counter(one["url"].partition("?")[0].split("/", 3)[-1] for one in seen)
        slowest = max(one["milliseconds"] for one in seen)
        report = {
            "requests": len(seen), "statuses": dict(sorted(statuses.items())), "routes": dict(routes.most_common()),
            "slowest_milliseconds": slowest, "ready_afterwards": alive, "failed": failed,
        }  # fmt: skip
        Path(sys.argv[3]).write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(failed) or len(seen) < ENOUGH or not alive)


if __name__ == "__main__":
    sys.exit(main())
