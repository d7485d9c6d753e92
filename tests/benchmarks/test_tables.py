"""The tables of README and docs are those of the result files, and a changed figure is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(root: Path, *words: str) -> subprocess.CompletedProcess:
    script = root / "benchmarks" / "tables.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """What the script reads and writes, beside a copy of itself."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    for name in ("README.md", "docs/results/README.md", "benchmarks/tables.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / "benchmarks" / "results" / path.name).write_text(path.read_text())
    return tmp_path


def test_documents_show_the_results():
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("document", "shown"), [("README.md", "9.88 |"), ("docs/results/README.md", "9.88 (")])
def test_a_changed_figure_is_noticed_and_mended(copy, document, shown):
    path = copy / "benchmarks" / "results" / "serving.json"
    found = json.loads(path.read_text())
    found["rows"][1]["kv_bound"]["ratio_to_dense"]["median"] = 9.876
    path.write_text(json.dumps(found))
    done = run(copy, "--check")
    assert done.returncode == 1
    assert "README.md differs" in done.stderr
    assert run(copy).returncode == 0
    assert shown in (copy / document).read_text()
    assert run(copy, "--check").returncode == 0


def test_missing_results_are_said_to_be_missing(copy):
    (copy / "benchmarks" / "results" / "serving.json").unlink()
    assert run(copy).returncode == 0
    table = (
        (copy / "README.md").read_text().partition("<!-- table: serving_short -->\n")[2].partition("<!-- end -->")[0]
    )
    assert table == "Not measured yet.\n"
