"""A pruned checkpoint as the draft of its own dense parent: what is checked before vLLM gets both.

Answers stay those of the served model whatever the draft says; a draft of another model would only be slow. So what is
refused here is what vLLM would read wrongly or never accept a token of.
"""

import json
from pathlib import Path
from typing import Any

from pruning.models.checkpoint import hash_file, hash_files, is_pruned, read_manifest, verify
from server.errors import SettingsError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")  # vLLM goes by these in a draft's path, whatever it is told


def draft_config(draft: Path, tokens: int) -> dict[str, Any]:
    """vLLM's `--speculative-config` for a checkpoint that guesses `tokens` tokens a step."""
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": tokens}


def check_draft(draft: Path, model: str, *, verified: bool) -> None:
    """Check that a draft is whole and made from the model that is served.

    Args:
        draft: Checkpoint of prune-export.
        model: What is served: a directory, else a hub id, of which only the name can be compared.
        verified: Compare file hashes: the draft's with its manifest, the model's with the draft's base.

    Raises:
        SettingsError: It is no checkpoint, or of another model, vocabulary or tokenizer.
        CheckpointError: It is damaged.
    """
    if not draft.is_dir():
        raise SettingsError(f"draft {draft} is not a directory; give a checkpoint of prune-export")
    if not is_pruned(draft):
        raise SettingsError(
            f"draft {draft} is not a checkpoint of prune-export; for other drafts give vLLM's --speculative-config "
            "after --"
        )
    for word in OTHER_METHODS:
        if word in str(draft).lower():
            raise SettingsError(f"vLLM takes a draft with {word!r} in its path for one of another kind; rename {draft}")
    manifest = verify(draft) if verified else read_manifest(draft)
    directory, base = Path(model), manifest.base
    if not directory.is_dir():
        if base["model"] != model:
            raise SettingsError(f"draft {draft} was made from {base['model']}, not from {model}")
        return
    sizes = [_vocabulary_size(path) for path in (draft, directory)]
    if sizes[0] != sizes[1]:
        raise SettingsError(f"draft {draft} has a vocabulary of {sizes[0]} tokens, {model} one of {sizes[1]}")
    for name in VOCABULARY_FILES:
        files = [path / name for path in (draft, directory)]
        if files[0].is_file() != files[1].is_file() or (
            files[0].is_file() and hash_file(files[0]) != hash_file(files[1])
        ):
            raise SettingsError(f"draft {draft} and {model} differ in {name}; both must have the same tokenizer")
    if verified and _weight_hash(directory) != base["weight_hash"]:
        raise SettingsError(
            f"draft {draft} was made from {base['model']} with other weights than those of {model}; serve its own "
            "dense model, or export the draft again"
        )


def _vocabulary_size(directory: Path) -> int | None:
    try:
        size: int | None = json.loads((directory / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{directory / 'config.json'} does not tell the size of the vocabulary") from error
    return size


def _weight_hash(directory: Path) -> str:
    """Of the dense model: of a pruned one that which its own manifest names."""
    if is_pruned(directory):
        return str(read_manifest(directory).base["weight_hash"])
    return hash_files(sorted(directory.glob("*.safetensors")))
