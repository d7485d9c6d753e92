"""Directories that are either whole or absent, and the journal of work already done."""

import hashlib
import json
import os
import shlex
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pruning.errors import StorageError


def cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/shoal` or `~/.cache/shoal`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal"


def healing_states(output: Path) -> tuple[Path, Path]:
    """Where training with gates, and training of a plan, are kept until the checkpoint is whole; for all processes."""
    key = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    journals = cache_directory() / "journals"
    return journals / f"{key}.gates.safetensors", journals / f"{key}.healing.safetensors"


def unexpected(error: Exception, command: Sequence[str]) -> str:
    """Keep the traceback of an error that nothing foresaw in a file; one line that says what to report.

    Args:
        error: With its traceback.
        command: What was typed.
    """
    about = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    text = f"{shlex.join(command)}\n\n{''.join(traceback.format_exception(error))}"
    directory = cache_directory() / "errors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="replace", prefix=time.strftime("%Y%m%d-%H%M%S-"), suffix=".txt",
            dir=directory, delete=False,
        ) as file:  # fmt: skip
            file.write(text)
    except OSError:
        return f"{about}; this is a fault of Shoal, please report it with this:\n{text}"
    return f"{about}; this is a fault of Shoal, please report it with {file.name}"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output path that exists and is not an empty directory.

    Raises:
        StorageError: The path is taken, or its parent cannot be written to.
    """
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise StorageError(f"output {output} is not empty; choose another --output or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise StorageError(f"output {output} is a file; choose a directory")
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise StorageError(f"cannot write to {parent}; choose another --output")


def check_free_space(output: Path, needed_bytes: int) -> None:
    """Refuse early when the file system cannot hold the result.

    Raises:
        StorageError: Fewer than `needed_bytes` are free.
    """
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise StorageError(
            f"{output} needs {needed_bytes / 2**20:.0f} MiB but only {free / 2**20:.0f} MiB are free; "
            "free some space or choose another --output"
        )


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `output` that replaces it when the block ends without an error.

    Raises:
        StorageError: The disk filled up or refused a write; nothing is left behind.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise StorageError(f"cannot write beside {output}: {error.strerror or error}") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        # safetensors writes for the owner's eyes only, and a checkpoint is served by another user than made it. Files
        # that have another name elsewhere are somebody else's too and stay as they are.
        for path in temporary.rglob("*"):
            if path.is_dir() or not (path.is_symlink() or path.stat().st_nlink > 1):
                path.chmod(0o755 if path.is_dir() else 0o644)
        if output.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
            output.rename(retired / "old")
            temporary.rename(output)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.rename(output)
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Journal:
    """Results kept on disk as they come, so that a run that was killed goes on where it stopped.

    An entry's key is the digest of all that its value depends on, so a changed request finds nothing that is not its
    own. Values are JSON; float64 survives exactly.

    Args:
        path: JSON lines, one entry each; None keeps nothing.
        scope: What every entry depends on besides its own key: the model, its dtype, the device.
        lasting: Whether other runs want it when this one is done.
    """

    def __init__(self, path: Path | None = None, scope: str = "", *, lasting: bool = False) -> None:
        self.path, self.lasting, self._scope = path, lasting, scope
        self._entries: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # the line that was being written when the run was killed
                self._entries[entry["key"]] = entry["value"]
                whole += len(line)
        os.truncate(path, whole)

    def _digest(self, key: object) -> str:
        return hashlib.sha256(json.dumps([self._scope, key], sort_keys=True).encode()).hexdigest()

    def recall(self, key: object) -> Any:
        """The value kept under a key (anything JSON can hold), else None."""
        return self._entries.get(self._digest(key))

    def keep(self, key: object, value: object) -> None:
        """Keep a value; on disk before this returns.

        Raises:
            StorageError: The journal cannot be written.
        """
        if self.path is None:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps({"key": self._digest(key), "value": value}) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Close the file, and remove it if no other run wants it: the work it stood for is done."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path is not None and not self.lasting:
            self.path.unlink(missing_ok=True)
