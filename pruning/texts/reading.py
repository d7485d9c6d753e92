"""Text files, read and checked before anything costs time."""

import json
from pathlib import Path

from pruning.errors import CalibrationError


def lone_surrogate(error: UnicodeEncodeError) -> str:
    r"""What is wrong with a text that UTF-8 cannot hold, such as JSON's "\ud800"."""
    return rf"half of a character, \u{ord(error.object[error.start]):04x}, stands alone; no text holds that"


def read_text(path: Path) -> str:
    """Read a text file, or the `text` (else `content`) field of every line of a JSONL file.

    Raises:
        CalibrationError: Unreadable, not UTF-8, or JSONL without such a field.
    """
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CalibrationError(f"cannot read calibration file {path}: {reason}") from error
    if path.suffix != ".jsonl":
        return raw
    texts = []
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row.get("text") or row["content"]
            text.encode()
        except UnicodeEncodeError as error:
            raise CalibrationError(f"{path}:{number}: {lone_surrogate(error)}") from error
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CalibrationError(f"{path}:{number}: expected a JSON object with a 'text' field") from error
        texts.append(text)
    return "\n\n".join(texts)
