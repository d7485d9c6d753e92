"""Start the server with keys and let four clients talk to it: openai (Python, npm), litellm, LangChain.

usage: run.py CHECKPOINT PYTHON, where PYTHON has the packages of the `clients` dependency group; npm packages are
installed beside this file (`make client-check` does both). Prints a table; exit code 1 if any check failed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # before `tests`, where `pruning` is a directory of tests
from tests.conftest import serve  # noqa: E402


def main() -> int:
    checkpoint, python = Path(sys.argv[1]), sys.argv[2]
    commands = {
        "openai (Python)": [python, HERE / "python_clients.py", "openai"],
        "openai (npm)": ["node", HERE / "openai_npm.mjs"],
        "litellm": [python, HERE / "python_clients.py", "litellm"],
        "LangChain": [python, HERE / "python_clients.py", "langchain"],
    }
    with tempfile.TemporaryDirectory() as place:
        keys = Path(place, "keys")
        names = [f"limited-{i}" for i in range(len(commands))]
        lines = ["all:key-all", *(f"{name}:key-{name} requests_per_minute=2" for name in names)]
        keys.write_text("\n".join(lines) + "\n")
        failures = 0
        with serve(
            checkpoint, Path(place, "log"), "--api-keys-file", str(keys), engine=["--max-model-len", "1024"]
        ) as s:
            for name, (client, command) in zip(names, commands.items(), strict=True):
                env = os.environ | {
                    "SHOAL_URL": s.url, "SHOAL_MODEL": s.model, "SHOAL_KEY": "key-all",
                    "SHOAL_LIMITED_KEY": f"key-{name}",
                }  # fmt: skip
                done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
                results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                if len(results) != 8:
                    failures += 1
                    print(f"{client:16} broke off: {done.stderr[-2000:]}")
                for result in results:
                    failures += result["failure"] is not None
                    print(f"{client:16} {result['check']:20} {result['failure'] or 'ok'}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
