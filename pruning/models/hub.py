"""Files from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from pruning.errors import ModelError

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def snapshot(name: str, patterns: Sequence[str], otherwise: str) -> Path:
    """The directory of a repository's newest snapshot, downloaded where it is not here yet.

    Args:
        name: `owner/name`.
        patterns: Files wanted.
        otherwise: What else the name could have been, for the message.

    Raises:
        ModelError: The hub does not have it or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{otherwise}, and the Hugging Face hub does not have it or cannot be reached") from error
