"""Rows of windows in the benchmarks of quality, of recovery and of choosers, each made once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_quality import data_in

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(script: str, *words: object, output: Path) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_quality_measures_plans_of_the_products_defaults(pico_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "quality.json"
    words = [pico_directory(), "--data", data_in(tmp_path), "--tokens", 1024, "--copies", 4, "--dtype", "float32",
             "--windows", "60%", "--row-tokens", 256]  # fmt: skip
    dense, limited = run("quality.py", *words, output=output)["rows"]
    assert limited["name"] == "windows, 60% of the KV cache"
    assert limited["perplexity"] != dense["perplexity"]
    (plan,) = (tmp_path / "quality.plans").iterdir()
    written = (plan / "plan.safetensors").stat().st_mtime_ns
    assert run("quality.py", *words, output=output)["rows"] == [dense, limited]
    assert (plan / "plan.safetensors").stat().st_mtime_ns == written


def test_recovery_and_choosers_have_rows_of_windows(pico_directory, text, tmp_path):
    judge = tmp_path / "judge.txt"
    judge.write_text("A lazy fox sleeps under the quick brown dog, now and then; and so on it goes. " * 200)
    fit = [pico_directory(), "--calibration", text, text, "--judge", judge, "--judge-tokens", 1024]
    rows = run("recovery.py", *fit, "--attention", "1,3", "--tokens", 512, "--technique", "none", "window",
               output=tmp_path / "recovery.json")["rows"]  # fmt: skip
    loss = {row["technique"]: row["loss"] for row in rows}
    assert abs(loss["window"] - loss["dense"]) < abs(loss["none"] - loss["dense"])
    found = run(
        "choosers.py", *fit, "--counts", 2, "--score-tokens", 1024, "--fit-tokens", 1024, "--rank", 4, "--length", 64,
        "--windows", "--choosers", "leave-one-out", "windows leave-one-out", output=tmp_path / "choosers.json",
    )  # fmt: skip
    assert set(found["plans"]) == {"leave-one-out", "windows leave-one-out"}
    for plan in found["plans"].values():
        assert f"window {','.join(map(str, sorted(plan['2'])))}" in found["losses"]
