"""Run a function that a model wrote against its tests, in a process of its own that may do next to nothing.

    passes("def double(x):\\n    return 2 * x", "double", [((3,), 6)])   # True

The process has a few seconds, half a gigabyte, no file to write, no environment and an empty directory. Where the
kernel allows it, it has a network of its own without devices; sockets and other processes are refused in any case. This
keeps a model's mistakes from doing harm. It is no prison for code that is made to break out.
"""

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

CPU_SECONDS = 3
WALL_SECONDS = 15
MEMORY_BYTES = 2**29

RUNNER = r"""
import ctypes, json, os, resource, sys
task = json.loads(sys.stdin.read())
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
try:
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
except (OSError, AttributeError):
    pass
for limit, value in (
    ("RLIMIT_CPU", task["cpu"]), ("RLIMIT_AS", task["memory"]), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0),
    ("RLIMIT_NPROC", 0),
):
    if hasattr(resource, limit):
        resource.setrlimit(getattr(resource, limit), (value, value))
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
           "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
           "os.truncate", "shutil.", "ctypes.", "signal.")
def watch(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError(event)
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError("open")
sys.addaudithook(watch)
names = {"__name__": "written"}
exec(compile(task["code"], "written", "exec"), names)
function = names[task["name"]]
def plain(value):
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
for arguments, wanted in task["tests"]:
    if plain(function(*arguments)) != wanted:
        raise SystemExit(1)
os.write(said, task["word"].encode())
"""


def passes(code: str, name: str, tests: Sequence[tuple[Sequence[Any], Any]]) -> bool:
    """Whether a function does what its tests say; anything else, no end among it, is no.

    Args:
        code: What was written.
        name: Of the function.
        tests: Arguments and result, in values that JSON holds; lists and tuples count as the same.
    """
    word = secrets.token_hex(16)
    task = {"code": code, "name": name, "tests": tests, "word": word, "cpu": CPU_SECONDS, "memory": MEMORY_BYTES}
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-c", RUNNER], input=json.dumps(task).encode(), check=False,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=WALL_SECONDS, cwd=directory, env={},
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.stdout.decode(errors="replace") == word
