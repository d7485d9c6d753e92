"""The safetensors files of a model directory, as they are: their headers, and other directories that share them."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pruning.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BASE = "model-base.safetensors"
"""What `SINGLE` is called beside other files: transformers would read nothing but a file of its own name."""
ADDED = "model-added.safetensors"
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that a model is loaded from.

    Attributes:
        directory: Where they are.
        files: Tensor name -> file name.
        headers: Tensor name -> dtype, shape, offsets.
    """

    directory: Path
    files: Mapping[str, str]
    headers: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> list[str]:
        """The files, sorted."""
        return sorted(set(self.files.values()))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(header["data_offsets"][1] - header["data_offsets"][0] for header in self.headers.values())

    @property
    def dtypes(self) -> set[str]:
        """Of the tensors, as safetensors names them, such as `BF16`."""
        return {str(header["dtype"]) for header in self.headers.values()}


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file without its metadata: tensor name -> dtype, shape, offsets.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end or not entry["dtype"]:
                raise ValueError("offsets that run backwards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path} as safetensors: {' '.join(str(error).split())}") from error
    return header


def data_start(path: Path) -> int:
    """Where the tensors of a safetensors file begin, which its offsets count from."""
    with path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def weight_files(directory: Path) -> WeightFiles:
    """The files that transformers and vLLM load a directory from: those of the index, else the single one.

    Raises:
        CheckpointError: There are none, one is missing, or one cannot be read.
    """
    if (directory / SINGLE).is_file() or not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")
        headers = header_of(directory / SINGLE)
        return WeightFiles(directory, dict.fromkeys(headers, SINGLE), headers)
    try:
        files: dict[str, str] = dict(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / INDEX} is damaged") from error
    headers = {}
    for name in sorted(set(files.values())):
        if PurePosixPath(name).name != name:
            raise CheckpointError(f"{directory / INDEX} names {name!r}, which is not a plain file name")
        found = header_of(directory / name)
        headers |= {tensor: header for tensor, header in found.items() if files.get(tensor) == name}
    if missing := sorted(set(files) - set(headers)):
        raise CheckpointError(f"{directory} lacks {missing[0]}, which its index names")
    return WeightFiles(directory, files, headers)


def placed(name: str) -> str:
    """What a base file is called in a directory that adds tensors to it."""
    return BASE if name == SINGLE else name


def index_with(base: WeightFiles, added: Mapping[str, int]) -> bytes:
    """The index of a directory that holds a base's files and `ADDED`.

    Args:
        base: The files of the dense model.
        added: Tensor name -> bytes.
    """
    files = {name: placed(file) for name, file in base.files.items()} | dict.fromkeys(added, ADDED)
    index = {
        "metadata": {"total_size": base.bytes + sum(added.values())},
        "weight_map": dict(sorted(files.items())),
    }
    return (json.dumps(index, indent=1) + "\n").encode()


def share(base: WeightFiles, directory: Path) -> None:
    """Hard-link the files of a base into a directory, or copy them where the file system does not link."""
    for name in base.names:
        link(base.directory / name, directory / placed(name))


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system does not link."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, somebody else's file, or too many links
        shutil.copyfile(source, target)


def quantisation_of(fields: Mapping[str, Any]) -> str | None:
    """What a configuration says the weights are quantised by; None: they are not."""
    found = fields.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "a method without a name")) if isinstance(found, Mapping) else "unreadable"
