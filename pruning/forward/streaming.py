"""Blocks from disk one at a time, for models that do not fit into memory."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pruning.errors import ModelError
from pruning.families import Family
from pruning.finite import check_tensors
from pruning.forward.blocks import Residency
from pruning.models.checkpoint import hash_files
from pruning.models.finding import Source
from pruning.models.loading import DenseModel, load_tokenizer


class Streamed(Residency):
    """Loads a block, the embedding or the head when it is needed, and lets it go after that.

    Args:
        model: From `empty_model`.
        family: Where its parts are.
        files: The safetensors files that hold its weights.
        dtype: To compute in.
        device: To compute on.

    Raises:
        ModelError: The files name the weights otherwise than the model does.
    """

    keeps_blocks = False

    def __init__(
        self, model: PreTrainedModel, family: Family, files: list[Path], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model, self._family, self._dtype, self._device = model, family, dtype, device
        self._checked: set[str] = set()
        self._file_of = {name: file for file in files for name in _names(file)}
        outside = [name for name, _ in model.named_parameters() if not name.startswith(family.blocks + ".")]
        self._head = [name for name in outside if name.startswith((family.head + ".", family.norm + "."))]
        # The model's own forward, which prepares what blocks are given, ends with the final norm.
        self._embedding = [name for name in outside if not name.startswith(family.head + ".")]
        self._stored_as: dict[str, str] = {}
        if model.config.tie_word_embeddings:
            # Held at different times, so each gets a parameter of its own, read from the one stored tensor.
            weight = f"{family.head}.weight"
            (embedding,) = (name for name in self._embedding if name.endswith("embed_tokens.weight"))
            self._stored_as[weight] = embedding
            self._put(weight, torch.empty(0, device="meta"))
            self._head = [name for name in self._head if name != weight] + [weight]
        stored = (self._stored_as.get(name, name) for name, _ in model.named_parameters())
        if absent := [name for name in stored if name not in self._file_of]:
            raise ModelError(
                f"the weights lack {absent[0]}; --stream reads checkpoints that name parameters as the model does, "
                "which mixtures of experts do not"
            )

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Hold one block in memory inside the `with`."""
        prefix = f"{self._family.blocks}.{index}."
        with self._held([name for name, _ in self._model.named_parameters() if name.startswith(prefix)]):
            yield

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Hold what comes before block 0."""
        with self._held(self._embedding):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold what comes after the last block."""
        with self._held(self._head):
            yield

    @contextmanager
    def _held(self, names: list[str]) -> Iterator[None]:
        try:
            for name in names:
                self._put(name, self._read(self._stored_as.get(name, name)))
            yield
        finally:
            for name in names:
                self._put(name, self._model.get_parameter(name).detach().to("meta"))
            _give_back()

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if name not in self._checked:
            check_tensors([(name, tensor)], "the weights")
            self._checked.add(name)
        return tensor.to(self._device, self._dtype, copy=True)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))


def _give_back() -> None:
    """Return freed memory to the system where the C library (glibc) keeps it.

    PyTorch's aligned tensors fragment its heap: blocks loaded and freed in turn made the process grow by most of a
    block each time, until it held most of the model.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers (rotary frequencies) are real."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def open_streamed(source: Source, dtype: str, device: str) -> tuple[DenseModel, Streamed]:
    """A model without weights, and where they come from.

    Args:
        source: Where they are.
        dtype: "auto" (float32 on CPU, else bfloat16) or a torch dtype name.
        device: "cpu", "cuda", ... or "auto".

    Raises:
        ModelError: The tokenizer or the weights cannot be read.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    wanted = ("float32" if place.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    model = empty_model(source.config, getattr(torch, wanted))
    residency = Streamed(model, source.family, source.weights, model.dtype, place)
    dense = DenseModel(
        source.name, source.directory, model, load_tokenizer(source), source.family, hash_files(source.weights)
    )
    return dense, residency


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt", device="cpu") as opened:
        return list(opened.keys())
