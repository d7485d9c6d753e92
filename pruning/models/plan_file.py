"""A plan as a file: what is added to a dense model whose weights stay as they are.

    plan.safetensors = {"model.layers.7.self_attn.sink_key": [K, d], ...} and, in its metadata, one JSON document

The document says which base it is for, what becomes of each block, and how the plan came about and did. The tensors
have their names in the checkpoint, so that the file is one of its shards as it is. Every byte counts: a file that
is not exactly what was written is refused. Nothing here needs torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pruning import __version__
from pruning.errors import CheckpointError, ModelError
from pruning.families import FAMILIES, Family
from pruning.models.checkpoint import Manifest, combined, hash_each
from pruning.models.hub import snapshot
from pruning.models.weight_files import WeightFiles

PLAN = "plan.safetensors"
KEY = "shoal_plan"
VERSION = 1
CHAIN_VERSION = 2  # the manifest holds the steps before
READABLE_VERSIONS = (VERSION, CHAIN_VERSION)
LARGEST = 2**28  # bytes of a file that may be a plan
SHAPES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")
"""Fields of the base's configuration that a plan's tensors and layers depend on."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A tensor as a file holds it.

    Attributes:
        dtype: As safetensors names it, such as `F32`.
        shape: Its sizes.
        data: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class PlanFile(BaseModel):
    """The document of a plan file.

    Attributes:
        version: Of this document.
        model_type: Of the base.
        shapes: `SHAPES` of the base.
        block_configs: As in a checkpoint's `config.json`.
        manifest: As in a checkpoint's `pruning.json`, without hashes of files: the base's name, weight hash and dtype,
            recipe, figures, sizes.
        digest: SHA-256 of this document without this field, and of the tensors.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    model_type: str
    shapes: dict[str, int]
    block_configs: list[dict[str, dict[str, Any]]]
    manifest: Manifest
    digest: str = ""

    @property
    def family(self) -> Family:
        """Of the base."""
        return FAMILIES[self.model_type]

    def render(self, tensors: Mapping[str, Raw]) -> bytes:
        """The exact bytes of the file, digest included.

        Args:
            tensors: Name -> tensor.
        """
        header: dict[str, Any] = {}
        data = b""
        for name, raw in sorted(tensors.items()):
            span = [len(data), len(data) + len(raw.data)]
            header[name] = {"dtype": raw.dtype, "shape": list(raw.shape), "data_offsets": span}
            data += raw.data
        fields = self.model_dump(exclude={"digest"})
        fields["digest"] = hashlib.sha256(_json([fields, header]) + data).hexdigest()
        described = _json({"__metadata__": {"format": "pt", KEY: _json(fields).decode()}, **header})
        described += b" " * (-len(described) % 8)
        return len(described).to_bytes(8, "little") + described + data


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """A plan file that was read and found whole.

    Attributes:
        path: Where it is.
        raw: Its bytes.
        document: What it says.
        tensors: Name -> tensor.
    """

    path: Path
    raw: bytes
    document: PlanFile
    tensors: Mapping[str, Raw]


def find_plan(name: str) -> Path:
    """The plan file that somebody named.

    Args:
        name: A file, a directory that holds `plan.safetensors`, or `owner/name` on the Hugging Face hub.

    Raises:
        CheckpointError: A directory, here or on the hub, holds no plan.
        ModelError: There is no such thing.
    """
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ModelError(f"no such plan {name!r}: neither a file, nor a directory, nor owner/name")
        path = snapshot(name, [PLAN], f"no such plan {name!r}: neither a file nor a directory")
    if not (path / PLAN).is_file():
        raise CheckpointError(f"{name} holds no {PLAN}; make one with prune-export --format plan")
    return path / PLAN


def read_plan(path: Path) -> LoadedPlan:
    """Read a plan file and check every byte of it.

    Raises:
        CheckpointError: It is no plan, damaged, or of a version or a family this release does not know.
    """
    damaged = CheckpointError(f"{path} is damaged (it is not what was written); copy it again or export it again")
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is no plan of prune-export; it is too large for one")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if KEY not in metadata:
        raise CheckpointError(f"{path} is no plan of prune-export; make one with --format plan")
    try:
        fields = json.loads(metadata[KEY])
        version = fields["version"]
        writer = fields["manifest"]["shoal_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path} needs a reader of plan version {version!r}; this is shoal {__version__}, which reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}: "
            f"install shoal {writer} or newer (that one wrote it), or export again"
        )
    try:
        document = PlanFile.model_validate(fields)
        data = raw[8 + length :]
        tensors = {
            name: Raw(str(entry["dtype"]), tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        same = document.render(tensors) == raw
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    if not same:
        raise damaged
    if document.model_type not in FAMILIES:
        raise CheckpointError(f"{path} is for a {document.model_type!r}, which this release does not know")
    for name, entry in _entries(document.block_configs):
        if entry["no_op"] or entry.get("emulation"):
            raise CheckpointError(f"{path} takes {name} out of the model, which a plan cannot; export a checkpoint")
    return LoadedPlan(path, raw, document, tensors)


def _entries(block_configs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{kind}.{index}", entry) for index, block in enumerate(block_configs) for kind, entry in block.items()]


def check_shapes(plan: LoadedPlan, config: Mapping[str, Any], directory: Path) -> None:
    """Check that a dense model's configuration is that of a plan's base, as far as the plan depends on it.

    Args:
        plan: The plan.
        config: `config.json` of the dense model.
        directory: Where that is, for the message.

    Raises:
        CheckpointError: It is of another family or has other sizes.
    """
    base, found = plan.document, str(config.get("model_type"))
    if found != base.model_type:
        raise CheckpointError(f"{plan.path} is for a model of type {base.model_type}; {directory} is of type {found}")
    if any(name not in config for name in base.shapes):
        from pruning.models.configuration import base_config_class  # takes seconds, for configurations of long ago

        config = base_config_class(base.family).from_dict(dict(config)).to_dict()
    if not config.get("head_dim"):
        config = {**config, "head_dim": config["hidden_size"] // config["num_attention_heads"]}
    for name, size in base.shapes.items():
        if config.get(name) != size:
            raise CheckpointError(
                f"{plan.path} is for {base.manifest.base['model']} with {name} {size}; "
                f"{directory} has {config.get(name)}"
            )


def check_weights(plan: LoadedPlan, base: WeightFiles) -> None:
    """Check that a plan adds to a dense model and replaces nothing of it.

    Raises:
        CheckpointError: The dense model has a tensor of that name.
    """
    if taken := sorted(set(plan.tensors) & set(base.files)):
        raise CheckpointError(f"{plan.path} adds {taken[0]}, which {base.directory} has already")


def check_hash(plan: LoadedPlan, directory: Path) -> None:
    """Check that a dense model has the weights that a plan was made for, to the last bit.

    Raises:
        CheckpointError: It has others.
    """
    made_for = plan.document.manifest.base
    if combined(hash_each(sorted(directory.glob("*.safetensors")))) != made_for["weight_hash"]:
        raise CheckpointError(
            f"{plan.path} was made for {made_for['model']} with other weights than those of {directory}; "
            "serve that model, or export the plan again"
        )
