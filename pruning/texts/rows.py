"""Files as bytes and as rows: JSONL and Parquet, also compressed (`.gz`, `.zst`), or of a data set on the hub."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from pruning.errors import CalibrationError

COMPRESSED = (".gz", ".zst")
FILES = (".txt", ".md", ".json", ".jsonl", ".parquet", *COMPRESSED)
"""Endings by which a name that is not there is a file, and no data set of the hub."""
CONVERTED = "refs/convert/parquet"  # where the hub keeps every data set as Parquet
SPLIT = "train"
BATCH_ROWS = 256


def format_of(path: Path) -> str:
    """The ending that says what a file holds, such as `.jsonl`, without those of compression."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix


def located(path: Path) -> Path:
    """The file itself: for `owner/name` or `owner/name:split`, the first of a data set on the hub, downloaded.

    Raises:
        CalibrationError: The hub does not have it or cannot be reached.
    """
    named = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?", str(path))
    if named is None or path.suffix in FILES or path.exists():
        return path
    return _downloaded(named[1], named[2] or SPLIT)


@cache
def _downloaded(name: str, split: str) -> Path:
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        files = sorted(file.rfilename for file in hub.dataset_info(name, revision=CONVERTED).siblings or ())
        matching = [file for file in files if re.fullmatch(rf"[^/]+/(partial-)?{re.escape(split)}/\d+\.parquet", file)]
        if matching:
            first = min(matching, key=lambda file: (not file.startswith("default/"), file))
            return Path(hub.hf_hub_download(name, first, repo_type="dataset", revision=CONVERTED))
    except Exception as error:  # also those of the HTTP library that the hub's client uses
        raise CalibrationError(
            f"{name} is neither a file nor a data set that the Hugging Face hub has, or the hub cannot be reached"
        ) from error
    splits = sorted({file.split("/")[1] for file in files if file.count("/") == 2 and file.endswith(".parquet")})
    raise CalibrationError(f"the data set {name} has no split {split!r}; it has {', '.join(splits) or 'no Parquet'}")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read inside the `with`, decompressed.

    Raises:
        CalibrationError: It cannot be read, or is not whole.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as unpacked:
                yield cast(BinaryIO, unpacked)
        elif path.suffix == ".zst":
            import pyarrow

            with path.open("rb") as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
                yield io.BufferedReader(stream)
        else:
            with path.open("rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CalibrationError(f"cannot read {path}: {reason}") from error


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL or Parquet file, each with its place for messages (`FILE:7`).

    Args:
        path: The file, see `format_of`.
        columns: Of a Parquet file, those wanted; at least one must be there. None: all.

    Raises:
        CalibrationError: Unreadable, a line is not JSON or not UTF-8, or no such column.
    """
    return _parquet(path, columns) if format_of(path) == ".parquet" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8")
                if text.strip():
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{place}: not UTF-8 text") from error
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{place}: not JSON") from error


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with opened(path) as raw, ParquetFile(raw) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in columns if name in names]
            if not wanted:
                raise CalibrationError(f"{path} has no column {', '.join(columns or ())}; it has {', '.join(names)}")
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ArrowException, ValueError) as error:
        raise CalibrationError(f"cannot read {path}: not a Parquet file, or not all of one") from error
