"""Run the CPU image as production does and see it start, answer, drain and end.

`python deploy/checks/container.py DIR`, where DIR is a checkpoint. Read-only root file system, the image's own user, no
capabilities; needs podman or docker (`--engine "podman --runtime runc"` takes further words). Prints one JSON object;
exit code 1 when a step fails.
"""

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

NAME = "shoal-check"


def get(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of a GET, or of a POST when there is a body; status 0 when no whole answer comes."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""


def watch_start(url: str, started: float, running: list[str], deadline: float = 600) -> dict[str, Any]:
    """Seconds at which the health answers changed, until the server is ready."""
    checked = started
    seen: list[tuple[float, dict[str, int]]] = []
    while time.monotonic() - started < deadline:
        states = {name: get(f"{url}/health/{name}")[0] for name in ("startup", "live", "ready")}
        if not seen or seen[-1][1] != states:
            seen.append((round(time.monotonic() - started, 1), states))
        if states["ready"] == 200:
            return {"seconds_to_ready": seen[-1][0], "health": seen}
        if time.monotonic() - checked > 2:
            checked = time.monotonic()
            if subprocess.run(running, capture_output=True, text=True).stdout.strip() != "true":
                raise RuntimeError(f"the container ended while it started: {seen}")
        time.sleep(0.05)
    raise TimeoutError(f"not ready after {deadline:.0f} s: {seen}")


def drain(url: str, model: str, stop: list[str]) -> dict[str, Any]:
    """Stop the container while an answer is being written; the answer must come whole."""
    answer: list[tuple[int, str]] = []
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    request = threading.Thread(target=lambda: answer.append(get(f"{url}/v1/completions", body)))
    request.start()
    time.sleep(2)
    begun = time.monotonic()
    stopping = subprocess.Popen(stop, stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    refused, ready = get(f"{url}/v1/completions", body | {"stream": False})[0], get(f"{url}/health/ready")[0]
    request.join()
    stopping.wait()
    return {
        "stream_whole": answer[0][1].rstrip().endswith("data: [DONE]"),
        "ready_while_draining": ready,
        "new_request_while_draining": refused,
        "seconds_to_end": round(time.monotonic() - begun, 1),
    }


def main() -> int:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", default="docker", help="command and its first words")
    parser.add_argument("--image", default="shoal:0.1.0")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--run-flags", default="", help="further flags of run")
    flags = parser.parse_args()
    engine, directory = flags.engine.split(), flags.checkpoint.resolve()
    confined = [
        "--read-only",
        "--tmpfs",
        "/tmp:rw,size=2g,mode=1777",
        "--cap-drop",
        "all",
        "--network=host",
        "--shm-size=512m",
    ]
    mount = ["-v", f"{directory}:/models/{directory.name}:ro"]
    serve = [f"/models/{directory.name}", "--port", str(flags.port), "--", "--max-model-len", "2048"]
    run = [*engine, "run", "-d", "--name", NAME, *confined, *flags.run_flags.split(), *mount, flags.image, *serve]
    url = f"http://127.0.0.1:{flags.port}"
    started = time.monotonic()
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = {"user": "", "read_only": False}
    try:
        report |= watch_start(url, started, [*engine, "inspect", "-f", "{{.State.Running}}", NAME])
        identity = [
            *engine,
            "exec",
            NAME,
            "sh",
            "-c",
            "id -u; touch /x 2>/dev/null || echo read-only; command -v cc gcc g++ || echo none",
        ]
        report["user"], *rest = subprocess.run(identity, capture_output=True, text=True).stdout.split()
        report["read_only"], report["compilers"] = rest[0] == "read-only", rest[1:]
        size = subprocess.run(
            [*engine, "image", "inspect", "-f", "{{.Size}}", flags.image], capture_output=True, text=True
        )
        report["image_bytes"] = int(size.stdout)
        ask = {"model": directory.name, "temperature": 0, "max_tokens": 16,
               "messages": [{"role": "user", "content": "What is the capital of France?"}]}  # fmt: skip
        status, text = get(f"{url}/v1/chat/completions", ask)
        report["answer"] = json.loads(text)["choices"][0]["message"]["content"] if status == 200 else text
        report |= drain(url, directory.name, [*engine, "stop", "-t", "45", NAME])
        code = subprocess.run([*engine, "inspect", "-f", "{{.State.ExitCode}}", NAME], capture_output=True, text=True)
        report["exit_code"] = int(code.stdout)
    finally:
        logs = subprocess.run([*engine, "logs", NAME], capture_output=True, text=True)
        subprocess.run([*engine, "rm", "-f", NAME], capture_output=True)
    print(json.dumps(report, indent=1))
    sound = report["exit_code"] == 0 and report["stream_whole"] and report["read_only"] and report["user"] != "0"
    if not sound:
        print((logs.stdout + logs.stderr)[-3000:], file=sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
