"""The text inside this package: documents of many kinds, with their origin in `data/ORIGIN.toml`."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruning.errors import CalibrationError
from pruning.texts.calibration import interleave, standard_library_text

CHARACTERS_PER_TOKEN = 16  # at most, of text that is long enough to matter
DATA = Path(__file__).with_name("data")
Use = Literal["choose", "held out"]


@dataclass(frozen=True, slots=True)
class Document:
    """One document as `ORIGIN.toml` lists it.

    Attributes:
        file: Its name in `DATA`.
        kind: What it is, such as "fiction" or "code".
        use: Whether models are chosen and fitted on it, or only measured.
        title: Of the work, and which part of it.
        author: Of the work.
        licence: Under which it is here.
        source: Package, version and file that it was taken from.
        made: What was done to it.
    """

    file: str
    kind: str
    use: Use
    title: str
    author: str
    licence: str
    source: str
    made: str

    @property
    def text(self) -> str:
        """All of it."""
        return (DATA / self.file).read_text(encoding="utf-8")


@cache
def documents() -> tuple[Document, ...]:
    """Every document, in the order in which they alternate."""
    listed = tomllib.loads((DATA / "ORIGIN.toml").read_text(encoding="utf-8"))["document"]
    return tuple(Document(**each) for each in listed)


def rows_to_choose_on(tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None) -> Tensor:
    """Rows of the documents that models are chosen and fitted on, one of each document in turn.

    Args:
        tokenizer: Of the model.
        length: T.
        count: Rows wanted; None: all that there are.

    Returns:
        int64 [n, T].

    Raises:
        CalibrationError: There are fewer.
    """
    texts = [document.text for document in documents() if document.use == "choose"]
    rows = _rows(texts, tokenizer, length, count)
    if count is not None and len(rows) < count:
        raise CalibrationError(
            f"the built-in text holds {len(rows)} rows of {length} tokens, not {count}; give --calibration files"
        )
    return rows


def rows_held_out(tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """Rows of the other documents, one of each in turn; where they are too short, of all and Python's documentation.

    Args:
        tokenizer: Of the model.
        length: T.
        count: n.

    Returns:
        int64 [n, T].

    Raises:
        CalibrationError: There is less text than that.
    """
    texts = [document.text for document in documents() if document.use == "held out"]
    rows = _rows(texts, tokenizer, length, count)
    if len(rows) < count:
        rows = _rows(["\n\n".join([*texts, standard_library_text()])], tokenizer, length, count)
    if len(rows) < count:
        raise CalibrationError(
            f"the built-in text does not hold {count} rows of {length} tokens to measure on; give --calibration files"
        )
    return rows


def _rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int | None) -> Tensor:
    """Rows of each text in turn, `count` or as many as there are; where these are too few, of all texts as one."""
    if count is not None:
        share, parts = -(-count // len(texts)), list[Tensor]()
        for text in texts:
            parts.append(_cut(_encode(text[: share * length * CHARACTERS_PER_TOKEN], tokenizer), length)[:share])
            if sum(map(len, parts)) >= count:
                return interleave(parts)[:count]
    encoded = [_encode(text, tokenizer) for text in texts]
    parts = [_cut(ids, length) for ids in encoded]
    if count is not None and sum(map(len, parts)) < count:
        return _cut(torch.cat(encoded), length)[:count]
    return interleave(parts)[:count]


def _cut(ids: Tensor, length: int) -> Tensor:
    return ids[: len(ids) // length * length].view(-1, length)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
