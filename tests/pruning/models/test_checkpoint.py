"""A checkpoint that is not what was written is refused."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruning.errors import CheckpointError
from pruning.models.checkpoint import CHAIN_VERSION, MANIFEST, read_manifest, verify


@pytest.fixture
def checkpoint(pico_checkpoint, tmp_path):
    return shutil.copytree(pico_checkpoint("llama")[0], tmp_path / "checkpoint")


def test_an_untouched_checkpoint_is_accepted(checkpoint):
    assert verify(checkpoint).removed["attention.2"] == "context"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_any_file_is_refused(checkpoint, data):
    path = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[at + 1 :])
    try:
        with pytest.raises(CheckpointError):
            verify(checkpoint)
    finally:
        path.write_bytes(raw)


def test_truncated_and_deleted_files_are_refused(checkpoint):
    for path in sorted(checkpoint.iterdir()):
        raw = path.read_bytes()
        path.write_bytes(raw[:-1])
        with pytest.raises(CheckpointError):
            verify(checkpoint)
        path.unlink()
        with pytest.raises(CheckpointError):
            verify(checkpoint)
        path.write_bytes(raw)
    verify(checkpoint)


def test_a_newer_format_version_is_named(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["format_version"] = CHAIN_VERSION + 1
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"format version {CHAIN_VERSION + 1}"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", ""])
def test_a_manifest_that_points_elsewhere_is_refused(checkpoint, name):
    manifest = read_manifest(checkpoint)
    manifest.files[name] = "0" * 64
    (checkpoint / MANIFEST).write_bytes(manifest.render())
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify(checkpoint)


def test_symbolic_links_are_refused(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["extra.safetensors", "pytorch_model.bin", "modeling_evil.py", "x.pkl"])
def test_files_that_a_loader_could_pick_up_must_be_listed(checkpoint, name):
    (checkpoint / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not listed"):
        verify(checkpoint)
