"""The wheel holds everything that runs: modules, templates, the page, the entry points."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pruning", "server")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, source], cwd=source, check=True, capture_output=True)
    (path,) = source.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_file_of_the_packages_is_in_it(wheel):
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"server/static/index.html", "pruning/export/formats/decilm_config.txt"} <= files
    assert [name for name in files if name.endswith(".j2")]
    assert files == {name for name in wheel.namelist() if name.split("/")[0] in PACKAGES}


def test_it_names_the_commands_and_the_plugin_of_vllm(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    points = wheel.read(name).decode()
    for line in ("prune-export = pruning.cli:main", "prune-serve = server.cli:main", "shoal = server.plugin:register"):
        assert line in points.splitlines()
    assert "[vllm.general_plugins]" in points
