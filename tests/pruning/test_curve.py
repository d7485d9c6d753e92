"""The curve of budgets: one search, predictions that meet the measured ends, a plan for each budget."""

import json

import pytest

from pruning.curve import _spread
from tests.conftest import run_prune_export as run


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, again and again; so it goes. " * 200)
    return path


def test_draws_every_budget_from_one_search(monkeypatch, pico_directory, long_text, tmp_path, capsys):
    options = ["--context", "256", "--calibration", long_text]
    output = tmp_path / "curve"
    assert run(monkeypatch, "plan", pico_directory(), "--output", output, "--measured", 2, *options) == 0
    printed, document = capsys.readouterr(), json.loads((output / "curve.json").read_text())
    points = document["points"]
    shares = [point["kv_share"] for point in points]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / 16)  # half windows in all layers
    assert len([point for point in points if "measured_ratio" in point]) == 3
    assert points[0]["predicted_ratio"] == pytest.approx(points[0]["measured_ratio"])
    assert "100%" in printed.out
    assert all((output / name).stat().st_size for name in ("report.html", "curve.png"))
    assert run(monkeypatch, "plan", pico_directory(), "--measured", 0, *options) == 0
    again = capsys.readouterr()
    assert "gates by head: " not in again.err
    made = tmp_path / "made"
    assert run(monkeypatch, pico_directory(), "--output", made, "--kv-budget", "30%", *options) == 0
    sizes = json.loads((made / "pruning.json").read_text())["sizes"]
    assert sizes["kv_request"] / sizes["kv_request_dense"] in [pytest.approx(share) for share in shares]


def test_a_curve_is_of_windows(monkeypatch, pico_directory, long_text, capsys):
    assert run(monkeypatch, "plan", pico_directory(), "--emulation", "low-rank", "--calibration", long_text) == 2
    assert "plan draws the curve of windows" in capsys.readouterr().err


def test_measured_points_are_spread():
    assert _spread(9, 3) == {1, 4, 7}
    assert _spread(2, 5) == {0, 1}
    assert _spread(4, 0) == set()
