"""Write a directory so that it is either whole or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruning.errors import StorageError


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
