"""A dense directory with a plan applied: a checkpoint made of links, in the user's cache.

It holds symbolic links to the dense model's files, the plan file as one more shard, an index that names all, the
configuration of the pruned family and a manifest. Whatever reads checkpoints reads it. Its name is a digest of all that
is in it; it is made in one step, and used again while nothing of it has changed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pruning.errors import CheckpointError, StorageError
from pruning.models.checkpoint import MANIFEST
from pruning.models.hub import MODEL_FILES, snapshot
from pruning.models.plan_file import LoadedPlan, check_hash, check_shapes, check_weights, find_plan, read_plan
from pruning.models.weight_files import ADDED, INDEX, WeightFiles, index_with, placed, quantisation_of, weight_files
from pruning.workdir import atomic_directory, cache_directory

CONFIG = "config.json"
COMPANIONS = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
"""Suffixes of what lies beside weights and is read: tokenizer, templates, generation, quantisation."""


def apply_plan_file(dense: str, plan: str, say: Callable[[str], None], *, hashed: bool = True) -> Path:
    """The directory of a dense model with a plan applied.

    Args:
        dense: A model directory or `owner/name`; a quantised sibling of the plan's base too.
        plan: What `find_plan` takes.
        say: For a line where less than everything could be checked.
        hashed: Whether to compare the weights with those the plan was made for.

    Raises:
        UserError: The plan is damaged or for another model, or there is no such plan or model.
    """
    loaded = read_plan(find_plan(plan))
    path = Path(dense)
    directory = path if path.is_dir() else snapshot(dense, MODEL_FILES, f"no such model {dense!r}: not a directory")
    config = _configuration(directory)
    check_shapes(loaded, config, directory)
    base = weight_files(directory)
    check_weights(loaded, base)
    quantised, chosen_on = quantisation_of(config), loaded.document.manifest.base.get("quantisation")
    if quantised != chosen_on:
        which = f"{dense} is quantised" if quantised else f"{loaded.path} was chosen on a quantised model"
        say(f"{which}, so the weights cannot be the same: only shapes were checked")
    elif hashed:
        check_hash(loaded, directory)
    else:
        say(f"weights of {dense} were not compared with those {loaded.path} was made for: only shapes were checked")
    contents, links = _contents(loaded, config, base)
    target = cache_directory() / "plans" / f"{path.resolve().name}-{_digest(contents, links)}"
    if not _holds(target, contents, links):
        _make(target, contents, links)
    return target


def _configuration(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} has no readable {CONFIG}; a plan needs the dense model beside it"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG} is damaged")
    return config


def _contents(plan: LoadedPlan, config: dict[str, Any], base: WeightFiles) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What is written, and what is linked: file name -> bytes, and -> file."""
    family = plan.document.family
    fields = {name: value for name, value in config.items() if name not in ("auto_map", "_name_or_path")}
    fields |= {
        "model_type": family.pruned_model_type,
        "architectures": [family.architecture],
        "block_configs": plan.document.block_configs,
    }
    added = {name: len(raw.data) for name, raw in plan.tensors.items()}
    manifest = plan.document.manifest.model_copy(deep=True)
    manifest.sizes |= {"weights_dense": base.bytes, "weights": base.bytes + sum(added.values())}
    contents = {
        CONFIG: (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode(),
        INDEX: index_with(base, added),
        ADDED: plan.raw,
        MANIFEST: manifest.render(),
    }
    links = {placed(name): base.directory / name for name in base.names}
    for path in base.directory.iterdir():
        if path.suffix in COMPANIONS and path.is_file() and path.name not in contents:
            links[path.name] = path
    return contents, {name: path.resolve() for name, path in sorted(links.items())}


def _digest(contents: dict[str, bytes], links: dict[str, Path]) -> str:
    written = {name: hashlib.sha256(raw).hexdigest() for name, raw in contents.items()}
    linked = {name: str(path) for name, path in links.items()}
    return hashlib.sha256(json.dumps([written, linked], sort_keys=True).encode()).hexdigest()[:16]


def _holds(target: Path, contents: dict[str, bytes], links: dict[str, Path]) -> bool:
    """Whether a directory is there already and still what it has to be."""
    try:
        return (
            {path.name for path in target.iterdir()} == set(contents) | set(links)
            and all((target / name).readlink() == path for name, path in links.items())
            and all((target / name).read_bytes() == raw for name, raw in contents.items())
        )
    except OSError:
        return False


def _make(target: Path, contents: dict[str, bytes], links: dict[str, Path]) -> None:
    try:
        with atomic_directory(target) as temporary:
            for name, path in links.items():
                (temporary / name).symlink_to(path)
            for name, raw in contents.items():
                (temporary / name).write_bytes(raw)
    except StorageError:
        if not _holds(target, contents, links):  # else another process was faster
            raise
