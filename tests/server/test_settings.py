"""Flags over variables over the file over defaults, and combinations that make no sense."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "shoal.yaml"
    path.write_text("port: 1\nmax_body_bytes: 1\nlog_format: json\n")
    return path


def test_flags_win_over_variables_over_the_file_over_defaults(yaml, monkeypatch):
    monkeypatch.setenv("SHOAL_PORT", "2")
    monkeypatch.setenv("SHOAL_MAX_BODY_BYTES", "2")
    settings = Settings(config=yaml, port=3)
    assert (settings.port, settings.max_body_bytes, settings.log_format) == (3, 2, "json")
    assert settings.max_queued_requests == 256


def test_a_misspelt_key_of_the_file_is_refused(tmp_path):
    path = tmp_path / "shoal.yaml"
    path.write_text("prot: 1\n")
    with pytest.raises(ValidationError, match="prot"):
        Settings(config=path)


def test_limits_of_keys_need_keys():
    with pytest.raises(ValidationError, match="give api_keys_file too"):
        Settings(requests_per_minute=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999"], "--port (SHOAL_PORT)"),
        (["--requests-per-minute", "5"], "give api_keys_file too"),
        (["--log-format", "xml"], "log-format"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(flags, message):
    command = [str(Path(sys.executable).with_name("prune-serve")), "/", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
