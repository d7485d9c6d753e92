"""Load the dense model: a Hugging Face id or directory, a GGUF file, or the embedded default."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from pruning.console import Reporter
from pruning.errors import ModelError
from pruning.families import Family, own_window
from pruning.finite import check_tensors
from pruning.models.chain import Earlier, emulations_of
from pruning.models.checkpoint import combined, hash_each
from pruning.models.finding import DEQUANTISED, Source, find_model
from pruning.models.modeling import register_models
from pruning.models.residency import Residency
from pruning.plan import Sublayer
from pruning.variants.base import Emulation


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A model to prune.

    Attributes:
        name: What the user typed.
        directory: Where the weights and tokenizer are.
        weight_hash: SHA-256 over the weight files.
        hashes: SHA-256 of each of them, by name, where it was kept.
        earlier: What earlier runs made of it, where it is a checkpoint.
        limits: The modules by which earlier runs limited layers of the dense model, which is loaded without them.
        residency: Where the weights are.
    """

    name: str
    directory: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    family: Family
    weight_hash: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    earlier: Earlier | None = None
    limits: Mapping[Sublayer, Emulation] = field(default_factory=dict)
    residency: Residency = field(default_factory=Residency)

    @property
    def limitable(self) -> list[int]:
        """Blocks whose attention sees all tokens."""
        config = self.model.config
        changed = [] if self.earlier is None else self.earlier.changed(["attention"])
        free = [block for block in range(config.num_hidden_layers) if block not in changed]
        return [block for block in free if own_window(config, block) is None]


def load_model(source: Source, dtype: str, device: str) -> DenseModel:
    """Load the weights and the tokenizer.

    Args:
        source: Where they are.
        dtype: "auto" (float32 on CPU, else the model's own) or a torch dtype name.
        device: "cpu", "cuda", ... or "auto".

    Raises:
        ModelError: They cannot be loaded, one is missing, or there is no such device.
        NumberError: One holds a number that is not finite.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "auto"
    tokenizer = load_tokenizer(source)
    if source.earlier is not None:
        register_models()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.directory, config=source.config, dtype=dtype, local_files_only=True, output_loading_info=True,
            **dequantising(source.quantised),
        )  # fmt: skip
        model = model.eval().to(device)
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise ModelError(f"cannot load {source.name}: {' '.join(str(error).split())[:300]}") from error
    if absent := sorted(loading["missing_keys"]):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ModelError(f"the weights of {source.name} lack {absent[0]}{more}; copy them again")
    check_tensors(model.state_dict().items(), f"the weights of {source.name}")
    hashes = hash_each(source.weights)
    earlier, family, limits = source.earlier, source.family, dict[Sublayer, Emulation]()
    if earlier is not None and earlier.whole:
        limits = emulations_of(earlier, source.directory, model, family)
    return DenseModel(
        source.name, source.directory, model, tokenizer, family, combined(hashes), hashes, earlier, limits
    )  # fmt: skip


def dequantising(method: str | None) -> dict[str, Any]:
    """What has weights of this quantisation read as ordinary ones; nothing where there is none."""
    if method not in DEQUANTISED:
        return {}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}


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
