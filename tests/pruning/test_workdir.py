"""A directory appears whole or not at all, and for every reader."""

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pruning.errors import StorageError
from pruning.workdir import atomic_directory


def test_what_appears_is_readable_by_other_users(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "sub").mkdir(mode=0o700)
        save_file({"weight": torch.zeros(2)}, directory / "sub" / "model.safetensors")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path).rglob("*")}
    assert modes == {"out": 0o755, "sub": 0o755, "model.safetensors": 0o644}


def test_a_failure_keeps_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(StorageError, match="nothing was kept"), atomic_directory(tmp_path / "out") as directory:
        (directory / "new").rename(tmp_path / "missing" / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_whole_directory_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
