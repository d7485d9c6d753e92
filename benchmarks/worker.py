"""A benchmark's own script as a child process that keeps an engine: a JSON line in, a JSON line out."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


def start_worker(script: str, options: dict[str, Any], threads: int) -> subprocess.Popen[str]:
    """Start `python script --worker OPTIONS` as one vLLM engine in one process with `threads` threads."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, script, "--worker", json.dumps(options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@dataclass
class Worker:
    """A worker process and the name that results give its model."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, load: dict[str, Any]) -> dict[str, Any]:
        """Send a workload and wait for what comes of it."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(load) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The worker's next line."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine of {self.name} ended; see its messages above")
        return json.loads(line)
