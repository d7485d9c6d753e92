"""What people see on stderr: stages with their time and peak memory, and progress."""

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL_SECONDS = 10.0
LEAST_SECONDS = 2.0  # what takes longer says how long


def duration(seconds: float) -> str:
    """For people: 4 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{round(seconds / 60)} min"
    return f"{minutes // 60} h {minutes % 60} min"


def either(things: Sequence[object]) -> str:
    """For people: 1, 2 or 3."""
    *others, last = map(str, things)
    return f"{', '.join(others)} or {last}" if others else last


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Reporter:
    """Stage timer and progress on stderr; `stages` holds what each stage took, `expected` what is still to come."""

    console: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True, highlight=False))
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    estimate: float | None = None

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take note of what every stage to come will take."""
        self.expected = dict(seconds)
        self.estimate = self.seconds + sum(seconds.values())

    @property
    def peak_mebibytes(self) -> int:
        """Largest resident set of this process so far, MiB."""
        return round(peak_memory_bytes() / 2**20)

    @property
    def seconds(self) -> float:
        """Of all stages so far."""
        return sum(stage["seconds"] for stage in self.stages.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage: print what is left when it begins, its seconds and the process's peak memory when it ends."""
        start = time.perf_counter()
        left, about = sum(self.expected.values()), self.expected.pop(name, 0.0)
        self.say(f"{name} ..." + (f" about {duration(about)}, {duration(left)} left" if about > LEAST_SECONDS else ""))
        yield
        seconds = time.perf_counter() - start
        self.stages[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak_memory_bytes()}
        self.say(f"{name}: {seconds:.1f} s, peak memory {self.peak_mebibytes} MiB")

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
        self._done, self._start = 0, time.monotonic()
        self._next = self._start + LEAST_SECONDS
        self._task = bar.add_task(label, total=total) if bar else None

    def advance(self) -> None:
        """One more unit of work is done; in a pipe a line after two seconds, and then every ten."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
            return
        now = time.monotonic()
        if now >= self._next and self._done < self._total:
            self._next = now + LOG_INTERVAL_SECONDS
            left = (now - self._start) / self._done * (self._total - self._done)
            self._reporter.say(f"  {self._label}: {self._done}/{self._total}, {duration(left)} left")


def quiet_libraries() -> None:
    """Keep other libraries' warnings and bars out of our output."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
