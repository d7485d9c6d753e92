"""Weights taken from the dense model's files as they are, in their own dtype, a part at a time."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning.errors import StorageError
from pruning.export.formats import Copied
from pruning.export.untouched import DTYPES, in_dtype
from pruning.models.checkpoint import Manifest
from pruning.models.loading import DenseModel
from pruning.models.weight_files import (
    ADDED,
    INDEX,
    WeightFiles,
    data_start,
    header_of,
    index_with,
    link,
    placed,
    weight_files,
)
from pruning.plan import Plan, Sublayer
from pruning.variants.base import Emulation

PART_BYTES = 2**24  # copied at a time
NAMES = {name: stored for stored, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a file to be written: as safetensors describes it, and where it comes from.

    Attributes:
        dtype: Such as `BF16`.
        shape: Of the tensor.
        size: Its bytes.
        place: File and first byte there; None: `tensors` of `_write` hold it.
    """

    dtype: str
    shape: list[int]
    size: int
    place: tuple[Path, int] | None = None


class _Stored(Mapping[str, Tensor]):
    """Tensors by the names and in the dtype of a checkpoint; those on disk are read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype) -> None:
        self._tensors, self._names, self._dtype = tensors, names, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]].detach().to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_stored(emulations: Mapping[Sublayer, Emulation | None], dtype: str) -> None:
    """Round adapters to the dtype that they are stored in, in place, so that what is measured is what is written."""
    for emulation in emulations.values():
        for parameter in [] if emulation is None else emulation.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype)).to(parameter.dtype)


def copied(dense: DenseModel, plan: Plan, weights: Mapping[str, Tensor], manifest: Manifest) -> Copied:
    """What a model that `apply_plan` has cut takes from the dense model's files, and what it has besides.

    `sizes` and `base.dtype` of the manifest follow, where the files have another dtype than was computed in.

    Args:
        dense: The model; it was read block by block, so its parameters are empty.
        plan: By which it was cut.
        weights: The changed ones, by the dense model's names.
        manifest: What `pruning.json` is going to say, but for `files`.
    """
    base, dtype = weight_files(dense.directory), dense.residency.dtype
    assert dtype is not None
    state = dict(dense.model.state_dict())
    if dense.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    old = {name: _in_dense(name, dense.family.blocks, plan.blocks_kept()) for name in state}
    changed = {name: old[name] for name in state if old[name] in weights}
    made = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
    stored = getattr(torch, dtype)
    added = {**_Stored(made, {name: name for name in made}, stored)}
    in_dtype(manifest, dtype)
    manifest.sizes["weights_dense"] = base.bytes
    names = {name: old[name] for name in state if name not in changed and name not in made}
    return Copied(base, dense.hashes, names, _Both(added, _Stored(weights, changed, stored)), dtype)


class _Both(Mapping[str, Tensor]):
    """Two maps of different names as one."""

    def __init__(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        self._one, self._other = one, other

    def __getitem__(self, name: str) -> Tensor:
        return self._one[name] if name in self._one else self._other[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._one
        yield from self._other

    def __len__(self) -> int:
        return len(self._one) + len(self._other)


def _in_dense(name: str, blocks: str, kept: list[int]) -> str:
    """What a parameter of the cut model is called in the dense one, whose blocks are numbered from before the cut."""
    if not name.startswith(blocks + "."):
        return name
    index, _, rest = name[len(blocks) + 1 :].partition(".")
    return f"{blocks}.{kept[int(index)]}.{rest}"


def write_copied(found: Copied, directory: Path) -> int:
    """Write a checkpoint's weights: files of which everything stays are linked, others are written without the rest.

    Args:
        found: From `copied`.
        directory: To write into.

    Returns:
        Bytes of all tensors.

    Raises:
        StorageError: A file cannot be written, for example because the disk is full.
    """
    base = found.base
    files: dict[str, dict[str, str]] = {}
    for name, old in found.names.items():
        files.setdefault(base.files[old], {})[old] = name
    for file, kept in files.items():
        source = base.directory / file
        header = header_of(source)
        if kept == {name: name for name in header}:
            link(source, directory / placed(file))
            continue
        start = data_start(source)
        order = sorted(kept, key=lambda old: header[old]["data_offsets"][0])
        _write(directory / placed(file), {kept[old]: _entry(source, start, header[old]) for old in order}, {})
    own = {
        name: _Entry(NAMES[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape), tensor.nbytes)
        for name, tensor in found.added.items()
    }
    if own:
        _write(directory / ADDED, own, found.added)
    left = WeightFiles(
        directory,
        {name: base.files[old] for name, old in found.names.items()},
        {name: base.headers[old] for name, old in found.names.items()},
    )
    sizes = {name: entry.size for name, entry in own.items()}
    (directory / INDEX).write_bytes(index_with(left, sizes))
    return left.bytes + sum(sizes.values())


def _entry(file: Path, start: int, header: Mapping[str, Any]) -> _Entry:
    first, end = header["data_offsets"]
    return _Entry(header["dtype"], header["shape"], end - first, (file, start + first))


def _write(path: Path, entries: Mapping[str, _Entry], tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, one part of a tensor after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.size]}
        end += entry.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    try:
        with path.open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for name, entry in entries.items():
                for part in _parts(entry) if entry.place else [_bytes(tensors[name])]:
                    stream.write(part)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(f"cannot write {path.name} ({reason}); free some space; nothing was kept") from error


def _parts(entry: _Entry) -> Iterator[bytes]:
    assert entry.place is not None
    file, first = entry.place
    with file.open("rb", buffering=0) as stream:
        stream.seek(first)
        left = entry.size
        while left:
            part = stream.read(min(left, PART_BYTES))
            if not part:
                raise StorageError(f"{file} ends too early; copy it again")
            yield part
            left -= len(part)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
