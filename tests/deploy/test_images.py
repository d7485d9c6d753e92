"""The image files are linted, pinned, and end as a user without rights."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.deploy.paths import DEPLOY, ROOT
from tests.deploy.scan import IMAGES, image_with_faults, scans
from tests.deploy.tools import run


@pytest.mark.parametrize("name", IMAGES)
def test_image_file_is_clean(name: str) -> None:
    lint = run("hadolint", DEPLOY / name)
    assert lint.returncode == 0, lint.stdout
    assert scans()[name].failed == set()
    assert len(scans()[name].passed) > 10


def test_planted_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(image_with_faults())
    assert "DL3008" in run("hadolint", tmp_path / "Dockerfile").stdout
    assert scans()["Dockerfile.planted"].failed == {"CKV_DOCKER_3"}


def test_the_lock_has_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["embedded"] + extras["serve"] + extras["cpu"]
    locked = {line.partition("==")[0] for line in (DEPLOY / "requirements-cpu.txt").read_text().splitlines()}
    assert {re.split(r"[<>=!;\[ ]", line)[0].lower() for line in needed} <= locked


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9._-]+==[^=]+", line)] == []
