"""SIGTERM while an engine starts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import server

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"
START = f"""
import signal, subprocess, sys, time
from server.starting import interruptible

try:
    with interruptible(1.0):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # what Ray does when it is imported
        child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        try:
            print(child.pid, flush=True)
            time.sleep(100)
        finally:
            child.wait()  # as the interpreter does at its end for an engine process that nobody stopped
except KeyboardInterrupt:
    sys.exit(130)
"""
OVER = """
import os
import signal
from server.starting import interruptible

before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
with interruptible(0.1):
    fork = os.fork()
    if not fork:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os._exit(signal.getsignal(signal.SIGTERM) != signal.SIG_IGN)
    assert os.waitpid(fork, 0)[1] == 0  # an engine process has handlers of its own
assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
signal.signal(signal.SIGTERM, before)
assert signal.getsignal(signal.SIGTERM) == before
"""


def started(script):
    environment = {**os.environ, "PYTHONPATH": str(Path(server.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("signals", [1, 2])
def test_a_start_that_waits_for_its_child_ends_with_it(signals):
    process = started(START)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted while starting" in errors
    assert psutil.wait_procs([child], timeout=60)[0]


def test_after_the_start_signals_are_as_before():
    process = started(OVER)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
