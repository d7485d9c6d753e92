"""Refuse a damaged checkpoint before any weight is loaded."""

import os
from pathlib import Path

from pruning.checkpoint import verify
from pruning.errors import CheckpointError

SKIP_VERIFICATION = "SHOAL_SKIP_VERIFICATION"


def check_directory(model: str, load_format: str) -> None:
    """Check every file of a checkpoint against its manifest, unless `SHOAL_SKIP_VERIFICATION=1` or weights are dummies.

    Raises:
        CheckpointError: The checkpoint is incomplete, altered or of another format version.
    """
    if load_format == "dummy" or os.environ.get(SKIP_VERIFICATION) == "1":
        return
    directory = Path(model)
    if not directory.is_dir():
        raise CheckpointError(f"{model} is not a directory; download the checkpoint first and give its path")
    verify(directory)
