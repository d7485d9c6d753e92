"""`prune-serve` serves no damaged checkpoint: one line, exit code 2, whatever file is hit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import main


@pytest.fixture
def checkpoint(pico_checkpoint, tmp_path) -> Path:
    return shutil.copytree(pico_checkpoint("llama")[0], tmp_path / "checkpoint")


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_every_file_is_missed(damage, checkpoint, tmp_path, monkeypatch, capsys):
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {"config.json", "model.safetensors", "pruning.json", "tokenizer.json"} <= set(names)
    for name in names:
        copy = shutil.copytree(checkpoint, tmp_path / name)
        damage(copy / name)
        monkeypatch.setattr(sys, "argv", ["prune-serve", str(copy)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2, name
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        assert output.err.startswith("error: "), name


def test_the_command_itself(checkpoint):
    flip(checkpoint / "model.safetensors")
    command = [Path(sys.executable).with_name("prune-serve"), checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {checkpoint / 'model.safetensors'} does not match its SHA-256 in pruning.json; copy it again or "
        "export again\n"
    )
