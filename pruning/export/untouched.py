"""Plans that change no weight of the dense model: what can be shared with it, and what that is in bytes."""

import json
from pathlib import Path

from pruning.errors import CheckpointError
from pruning.export.formats import Copied, Untouched
from pruning.models.checkpoint import Manifest, combined
from pruning.models.loading import DenseModel
from pruning.models.weight_files import ADDED, BASE, SINGLE, WeightFiles, placed, quantisation_of, weight_files

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def untouched(dense: DenseModel, manifest: Manifest, dtype: str) -> Untouched | None:
    """The dense directory as what a plan that changes no weight shares; None where its files cannot serve as they are.

    `sizes` and `base.dtype` of the manifest follow, where the files have another dtype than was computed in.

    Args:
        dense: The model.
        manifest: What `pruning.json` is going to say, but for `files`.
        dtype: To store in, as asked for; "auto": the files' own.
    """
    try:
        base = _without_added(weight_files(dense.directory))
        config = json.loads((dense.directory / "config.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, ValueError):
        return None
    own = stored_dtype(base, config.get("dtype") or config.get("torch_dtype"))
    if own is None:
        return None
    if quantisation := quantisation_of(config):
        manifest.base["quantisation"] = quantisation
    keeps = dtype == "auto" or {DTYPES.get(each) for each in base.dtypes} == {dtype}
    if keeps:
        in_dtype(manifest, own)
        manifest.sizes["weights_dense"] = manifest.sizes["weights"] = base.bytes
    return Untouched(base, dense.hashes, own, keeps, manifest)


def in_dtype(manifest: Manifest, own: str) -> None:
    """Let a manifest count the KV cache in the dtype that weights are stored in, not in that which was computed in."""
    scale = BYTES[own] / BYTES[manifest.base["dtype"]]
    manifest.base["dtype"] = own
    for name in ("kv_per_token_dense", "kv_per_token", "kv_request_dense", "kv_request"):
        manifest.sizes[name] = int(manifest.sizes[name] * scale)


def untouched_in(directory: Path, manifest: Manifest) -> Untouched | None:
    """What a checkpoint shares with its dense model: all files but one, by their hashes; None where it does not.

    Args:
        directory: A checkpoint that was verified.
        manifest: Its own.
    """
    try:
        found = weight_files(directory)
    except CheckpointError:
        return None
    kept = [name for name in found.names if name != ADDED]
    hashes = {SINGLE if name == BASE else name: manifest.files[name] for name in kept}
    if combined(dict(sorted(hashes.items()))) != manifest.base["weight_hash"]:
        return None
    return Untouched(_without_added(found), {}, manifest.base["dtype"], True, manifest)


def _without_added(found: WeightFiles) -> WeightFiles:
    """The files of the dense model in a checkpoint that adds to them."""
    files = {name: file for name, file in found.files.items() if file != ADDED}
    return WeightFiles(found.directory, files, {name: found.headers[name] for name in files})


def links_to(directory: Path, output: Path) -> bool:
    """Whether the weight files of a directory are on the file system that an output goes to."""
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return all(path.stat().st_dev == parent.stat().st_dev for path in directory.glob("*.safetensors"))


def stored_dtype(base: WeightFiles, named: str | None) -> str | None:
    """The dtype of a model's files: that of all, or what its configuration names; None where neither says."""
    found = {DTYPES.get(each) for each in base.dtypes}
    one = next(iter(found)) if len(found) == 1 else (named or "").removeprefix("torch.")
    return one if one in BYTES else None


def known_hashes(found: Untouched | Copied | None, directory: Path) -> dict[str, str]:
    """SHA-256, by name, of the files in a directory that are the dense model's own by another name."""
    if found is None:
        return {}
    names = {placed(name): name for name in found.base.names}
    return {
        name: found.hashes[source]
        for name, source in names.items()
        if source in found.hashes
        and (directory / name).exists()
        and (directory / name).samefile(found.base.directory / source)
    }
