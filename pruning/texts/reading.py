"""Text to calibrate and measure on: plain files, rows of text, and chats. Read and checked before it costs time."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.errors import CalibrationError
from pruning.texts.rows import format_of, located, opened, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 2**26  # characters read of rows and of compressed files; a hub's data set may hold thousands of times more
TEXTS = ("text", "content")
CHATS = ("messages", "conversations")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks in a row of `conversations`, and the role that chat templates know."""


def lone_surrogate(error: UnicodeEncodeError) -> str:
    r"""What is wrong with a text that UTF-8 cannot hold, such as JSON's "\ud800"."""
    return rf"half of a character, \u{ord(error.object[error.start]):04x}, stands alone; no text holds that"


def read_text(path: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
    """Read a text file, or the rows of a JSONL or Parquet file or of a data set on the hub.

    A row holds `text` (else `content`), or a chat: `messages` with role and content, or `conversations` with from and
    value. Files may be compressed (`.gz`, `.zst`). Of rows and of compressed files the start is read: `ENOUGH`.

    Args:
        path: The file, or `owner/name` or `owner/name:split` on the hub.
        tokenizer: Whose template chats are written with; None: only to check the file, chats as plain text.

    Raises:
        CalibrationError: Unreadable, not UTF-8, a row without text, or a chat that the template does not take.
    """
    path = located(path)
    if format_of(path) not in (".jsonl", ".parquet"):
        return _plain(path)
    text, size = [], 0
    for place, row in read_rows(path, (*TEXTS, *CHATS)):
        text.append(_text_of(row, place, tokenizer))
        size += len(text[-1])
        if size >= ENOUGH:
            break
    return "".join(text).removesuffix("\n\n")


def _plain(path: Path) -> str:
    with opened(path) as file:
        raw = file.read() if path.suffix == ".txt" else file.read(ENOUGH)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end == len(raw) == ENOUGH:
            return raw[: error.start].decode("utf-8")
        raise CalibrationError(f"cannot read {path}: not UTF-8 text") from error


def _text_of(row: Any, place: str, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """A row's text and what parts it from the next; a template ends a chat by itself."""
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{place}: expected a JSON object with 'text' or 'messages'")
    try:
        for name in TEXTS:
            if isinstance(row.get(name), str) and row[name]:
                row[name].encode()
                return f"{row[name]}\n\n"
        for name in CHATS:
            if row.get(name) is not None:
                return _rendered(_messages(row[name], name, place), place, tokenizer)
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{place}: {lone_surrogate(error)}") from error
    raise CalibrationError(f"{place}: expected 'text', or a chat in 'messages'")


def _messages(turns: Any, name: str, place: str) -> list[dict[str, str]]:
    who, what = ("role", "content") if name == "messages" else ("from", "value")
    if not isinstance(turns, list) or not turns:
        raise CalibrationError(f"{place}: expected {name!r} to be a list of turns, each with {who!r} and {what!r}")
    messages = []
    for number, turn in enumerate(turns, 1):
        speaker, content = (turn.get(who), turn.get(what)) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise CalibrationError(f"{place}: turn {number} of {name!r} needs {who!r} and {what!r}, both texts")
        if name == "conversations":
            if speaker not in SPEAKERS:
                raise CalibrationError(f"{place}: turn {number} is from {speaker!r}, not {', '.join(SPEAKERS)}")
            speaker = SPEAKERS[speaker]
        (speaker + content).encode()
        messages.append({"role": speaker, "content": content})
    return messages


def _rendered(messages: list[dict[str, str]], place: str, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    if tokenizer is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CalibrationError(f"{place}: the model has no chat template to write 'messages' with; give it text")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{place}: the model's chat template does not take this chat: {reason}") from error
