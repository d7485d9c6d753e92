"""The contract between the two programs: `pruning.json`, its version, and the hash of every file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from pruning import __version__
from pruning.errors import CheckpointError

MANIFEST = "pruning.json"
FORMAT_VERSION = 5  # windows and planted sinks
CHAIN_VERSION = 6  # made of a checkpoint, in several steps
READABLE_VERSIONS = (1, 2, 3, 4, 5, 6)


class Manifest(BaseModel):
    """What `pruning.json` holds.

    Attributes:
        format_version: Of this file and of the directory's layout.
        base: `model`, `weight_hash` and `dtype` of the dense model.
        recipe: The resolved recipe that made the checkpoint.
        removed: Sublayer name -> kind of emulation.
        importance: Metric name -> sublayer name -> value.
        quality: Losses in nats/token, dense and pruned, and where they were measured.
        sizes: Bytes of weights and KV cache per token, dense and pruned.
        stages: Seconds and peak memory of each stage.
        files: SHA-256 of every other file.
        chain: The steps before this one, oldest first, where it was made of a checkpoint: recipe, version, sublayers,
            figures and digest of each. `removed`, `num_blocks` and `base` are of all steps.
        digest: SHA-256 of this document without this field.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    shoal_version: str
    base: dict[str, Any]
    recipe: dict[str, Any]
    num_blocks: int
    removed: dict[str, str]
    importance: dict[str, dict[str, float]]
    quality: dict[str, Any]
    sizes: dict[str, int]
    stages: dict[str, dict[str, float]]
    files: dict[str, str]
    chain: list[dict[str, Any]] = []
    digest: str = ""

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a chain that is empty, so that manifests of before there were any keep their bytes."""
        fields: dict[str, Any] = written(self)
        return fields if self.chain else {name: value for name, value in fields.items() if name != "chain"}

    def render(self) -> bytes:
        """The exact bytes of the file, digest included."""
        fields = self.model_dump(exclude={"digest"})
        body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        fields["digest"] = hashlib.sha256(body).hexdigest()
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_each(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name, in their order."""
    return {file.name: hash_file(file) for file in files}


def combined(hashes: Mapping[str, str]) -> str:
    """SHA-256 over files' own, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, hashes.values()))).hexdigest()


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the files' own, in their order."""
    return combined(hash_each(files))


def write_manifest(directory: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> None:
    """Hash every file of the directory and write `pruning.json`.

    Args:
        directory: Of the checkpoint.
        manifest: All but the hashes.
        known: File name -> SHA-256 of files that were hashed already.
    """
    known = known or {}
    names = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
    manifest.files = {name: known.get(name) or hash_file(directory / name) for name in names}
    (directory / MANIFEST).write_bytes(manifest.render())


def is_pruned(directory: Path) -> bool:
    """Whether a directory is, or claims to be, a checkpoint of ours."""
    if (directory / MANIFEST).exists():
        return True
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith("depth_pruned_")


def read_manifest(directory: Path) -> Manifest:
    """Read and check `pruning.json` itself.

    Raises:
        CheckpointError: Missing, altered, or of a version this release does not know.
    """
    try:
        raw = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{directory} has no readable {MANIFEST}; export it again") from error
    try:
        fields = json.loads(raw)
        version = fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged; export it again") from error
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{directory} needs a reader of checkpoint format version {version!r}; this is shoal {__version__}, which "
            f"reads {', '.join(map(str, READABLE_VERSIONS))}: install shoal {fields.get('shoal_version', '')} or "
            "newer (that one wrote it), or export again"
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged; export it again") from error
    if manifest.render() != raw:
        raise CheckpointError(f"{directory / MANIFEST} was altered (its digest does not match); export it again")
    return manifest


def verify(directory: Path, known: Mapping[str, str] | None = None) -> Manifest:
    """Check every file of a checkpoint against the manifest.

    Args:
        directory: Of the checkpoint.
        known: File name -> SHA-256 of files that this process has hashed already.

    Raises:
        CheckpointError: A file is missing, altered, unlisted where it could be loaded, or outside the directory.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        if PurePosixPath(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{directory / MANIFEST} names {name!r}, which is not a plain file name")
        path = directory / name
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint holds plain files only")
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {name}; copy it again or export again")
        if ((known or {}).get(name) or hash_file(path)) != expected:
            raise CheckpointError(f"{path} does not match its SHA-256 in {MANIFEST}; copy it again or export again")
    for path in directory.iterdir():
        loadable = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".py", ".gguf", ".pkl"}
        if loadable and path.name not in manifest.files:
            raise CheckpointError(f"{path} is not listed in {MANIFEST}; remove it")
    return manifest
