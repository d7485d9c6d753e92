"""The end of a start that is interrupted: within seconds, whatever the libraries that start an engine wait for."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from pruning.errors import Interrupted

INTERRUPTED, OVER = b"!", b"."
STARTING_SECONDS = 15.0  # vLLM gives an engine process 5 s to end


@contextmanager
def interruptible(seconds: float = STARTING_SECONDS) -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt` inside the `with`, and end the process and its children soon after.

    An exception alone is not enough. Ray puts a handler of its own in the place of ours when it is imported. An engine
    process that vLLM has started and not yet written down is stopped by nobody, and the interpreter waits for it at its
    end. So other handlers of SIGTERM are not installed in here, and a thread ends what is still there.

    Args:
        seconds: From the signal until the process is ended, if it has not ended by itself.
    """
    heard, said = os.pipe()  # may be written to by a handler, which must not wait for a lock
    threading.Thread(target=_end, args=(heard, seconds), name="end of the start", daemon=True).start()

    interrupted: list[bool] = []
    own = os.getpid()  # an engine process may be a fork of this one

    def interrupt(*_: Any) -> None:
        if os.getpid() != own:
            raise KeyboardInterrupt
        if not interrupted:  # a further signal would break off what is being cleaned up
            interrupted.append(True)
            os.write(said, INTERRUPTED)
            raise KeyboardInterrupt

    install = signal.signal

    def spared(number: int, handler: Any) -> Any:
        ours = number == signal.SIGTERM and os.getpid() == own
        return signal.getsignal(number) if ours else install(number, handler)

    before = install(signal.SIGTERM, interrupt)
    signal.signal = spared  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install
        if not interrupted:
            os.write(said, OVER)
            install(signal.SIGTERM, before)
        os.close(said)


def _end(heard: int, seconds: float) -> None:
    """Wait for a byte; then, after some seconds, end what is left of the process."""
    with open(heard, "rb", buffering=0) as pipe:
        if pipe.read(1) == OVER:
            return
    time.sleep(seconds)
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    print("interrupted while starting; what did not end is killed", file=sys.stderr, flush=True)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    os._exit(Interrupted.exit_code)
