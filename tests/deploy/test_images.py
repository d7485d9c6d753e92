"""The image files are linted, pinned, and end as a user without rights."""

import re
from pathlib import Path

import pytest

from tests.deploy.paths import DEPLOY
from tests.deploy.tools import run

IMAGES = sorted(path for path in DEPLOY.glob("Dockerfile*") if path.suffix != ".dockerignore")


def faults(path: Path) -> str:
    """What hadolint and checkov say of an image file."""
    lint = run("hadolint", path)
    flags = ("--framework", "dockerfile", "--skip-download", "--quiet", "--compact")
    scan = run("checkov", "-f", path, *flags, LOG_LEVEL="CRITICAL")
    return "" if lint.returncode == scan.returncode == 0 else lint.stdout + scan.stdout


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_image_file_is_clean(path: Path) -> None:
    assert faults(path) == ""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    (tmp_path / "Dockerfile").write_text(text.replace("libnuma1=2.0.16-1", "libnuma1").replace("USER 10001:10001", ""))
    found = faults(tmp_path / "Dockerfile")
    assert "DL3008" in found
    assert "CKV_DOCKER_3" in found


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[^=]+", line)] == []
