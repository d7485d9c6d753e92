"""What people see on stderr: stages with their time and peak memory, and progress."""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL_SECONDS = 10.0


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Reporter:
    """Stage timer and progress on stderr; `stages` holds what each stage took."""

    console: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True, highlight=False))
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and print its seconds and the process's peak memory when it ends."""
        start = time.perf_counter()
        self.say(f"{name} ...")
        yield
        seconds = time.perf_counter() - start
        self.stages[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak_memory_bytes()}
        self.say(f"{name}: {seconds:.1f} s, peak memory {peak_memory_bytes() / 2**20:.0f} MiB")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator["Step"]:
        """Yield an object whose `advance()` moves a bar (terminal) or logs every 10 seconds (pipe)."""
        if not self.console.is_terminal:
            yield Step(self, label, total)
            return
        bar = Progress(
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, transient=True,
        )  # fmt: skip
        with bar:
            yield Step(self, label, total, bar)


class Step:
    """Progress of one loop."""

    def __init__(self, reporter: Reporter, label: str, total: int, bar: Progress | None = None) -> None:
        self._reporter, self._label, self._total, self._bar = reporter, label, total, bar
        self._done, self._last = 0, time.monotonic()
        self._task = bar.add_task(label, total=total) if bar else None

    def advance(self) -> None:
        """One more unit of work is done."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
        elif time.monotonic() - self._last > LOG_INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._reporter.say(f"  {self._label}: {self._done}/{self._total}")


def quiet_libraries() -> None:
    """Keep other libraries' warnings and bars out of our output."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
