"""Blocks from disk one at a time, for models that do not fit into memory."""

import ctypes
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pruning.errors import ModelError
from pruning.families import Family
from pruning.finite import check_tensors
from pruning.models.checkpoint import combined, hash_each
from pruning.models.finding import Source
from pruning.models.loading import DenseModel, load_tokenizer
from pruning.models.residency import Residency
from pruning.models.weight_files import data_start, header_of

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
CHUNK_NUMBERS = 2**24  # converted at a time, where a tensor is read and converted in one go


class _Place(NamedTuple):
    """Where a tensor lies, and what it is there."""

    file: Path
    first: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Streamed(Residency):
    """Loads a block, the embedding or the head when it is needed, and lets it go after that.

    While a block runs, a thread reads the next one, in the dtype that it is stored in: the one after it, or the one
    before it where blocks are run backwards. So there is one block in the dtype that is computed in, and one as it is
    stored.

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
        self._places = {name: place for file in files for name, place in _places(file).items()}
        self._changed: Mapping[str, Tensor] = {}
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
        if absent := [name for name in stored if name not in self._places]:
            raise ModelError(
                f"the weights lack {absent[0]}; --stream reads checkpoints that name parameters as the model does, "
                "which mixtures of experts do not"
            )
        self._stored = self._places[self._embedding[0]].dtype
        self.dtype = str(self._stored).removeprefix("torch.")
        self._reader = ThreadPoolExecutor(1, "blocks")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._last = -1

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Hold one block in memory inside the `with`; read the next one meanwhile."""
        names, ahead, self._ahead = self._of_block(index), self._ahead, None
        read = ahead[1].result() if ahead is not None else {}
        following = index + (1 if index == 0 or index > self._last else -1)
        if index == 0 and self._last == 1:
            following = -1  # the way back ends here
        self._last = index
        with self._held(names, read if ahead is not None and ahead[0] == index else {}):
            del read
            if 0 <= following < self._model.config.num_hidden_layers:
                self._ahead = following, self._reader.submit(self._as_stored, following)
            yield

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Hold what comes before block 0."""
        with self._held(self._embedding, {}):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold what comes after the last block."""
        with self._held(self._head, {}):
            yield

    def change(self, weights: Mapping[str, Tensor]) -> None:
        """Let parameters be these tensors from now on, as they will be stored."""
        self._changed = weights

    def _of_block(self, index: int) -> list[str]:
        prefix = f"{self._family.blocks}.{index}."
        return [name for name, _ in self._model.named_parameters() if name.startswith(prefix)]

    def _as_stored(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block as they are stored, on the CPU."""
        pinned = self._device.type == "cuda"
        out = {}
        for name in self._of_block(index):
            place = self._places[self._stored_as.get(name, name)]
            out[name] = torch.empty(place.shape, dtype=place.dtype, pin_memory=pinned)
            _fill(out[name].view(-1), place, 0)
        return out

    @contextmanager
    def _held(self, names: list[str], read: dict[str, Tensor]) -> Iterator[None]:
        """Hold these parameters; those in `read` are there already, and are taken out of it."""
        try:
            for name in names:
                stored = read.pop(name, None)
                if name in self._changed:
                    stored = self._changed[name].to(self._stored)
                tensor = self._read(self._stored_as.get(name, name)) if stored is None else self._converted(stored)
                del stored
                if name not in self._checked:
                    check_tensors([(name, tensor)], "the weights")
                    self._checked.add(name)
                self._put(name, tensor)
                del tensor
            yield
        finally:
            for name in names:
                stand_in = self._model.get_parameter(name).detach().to("meta")
                self._put(name, stand_in[:0] if name in self._stored_as else stand_in)  # tied weights count once
            _give_back()

    def _converted(self, stored: Tensor) -> Tensor:
        return stored.to(self._device, self._dtype, non_blocking=stored.is_pinned())

    def _read(self, name: str) -> Tensor:
        """A tensor in the dtype that is computed in; no more than a part of it is there twice."""
        place = self._places[name]
        out = torch.empty(place.shape, dtype=self._dtype, device=self._device)
        flat, numbers = out.view(-1), prod(place.shape)
        if place.dtype == self._dtype and self._device.type == "cpu":
            _fill(flat, place, 0)
            return out
        part = torch.empty(min(numbers, CHUNK_NUMBERS), dtype=place.dtype)
        for first in range(0, numbers, CHUNK_NUMBERS):
            some = part[: numbers - first]
            _fill(some, place, first)
            flat[first : first + len(some)].copy_(some)
        return out

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))


def _places(file: Path) -> Mapping[str, _Place]:
    start = data_start(file)
    found = {}
    for name, entry in header_of(file).items():
        if entry["dtype"] in DTYPES:
            first = start + entry["data_offsets"][0]
            found[name] = _Place(file, first, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def _fill(flat: Tensor, place: _Place, first: int) -> None:
    """Read numbers of a stored tensor, from the `first` on, into a tensor [n] of its dtype."""
    view = memoryview(flat.view(torch.uint8).numpy())
    try:
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.first + first * flat.itemsize)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ModelError(f"{place.file} ends too early; copy it again")
                view = view[count:]
    except OSError as error:
        raise ModelError(f"cannot read {place.file}: {error.strerror or error}") from error


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
        ModelError: The tokenizer or the weights cannot be read, or the model is a checkpoint that was pruned before.
    """
    if source.earlier is not None:
        raise ModelError(f"{source.name} is pruned already; --stream takes the dense model that it was made from")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    wanted = ("float32" if place.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    model = empty_model(source.config, getattr(torch, wanted))
    residency = Streamed(model, source.family, source.weights, model.dtype, place)
    hashes = hash_each(source.weights)
    dense = DenseModel(
        source.name, source.directory, model, load_tokenizer(source), source.family, combined(hashes), hashes,
        residency=residency,
    )  # fmt: skip
    return dense, residency
