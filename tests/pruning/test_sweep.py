"""A sweep over budgets: stopped, resumed with the same numbers, and reported."""

import json
import re

import pytest

from pruning import cli, sweep
from pruning.errors import RecipeError
from pruning.request import parse_budgets
from pruning.sweep import knees, pareto


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["prune-export", "sweep", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def request_words(pico_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("Herring swim in shoals of many thousands, cod do not. " * 80)
    questions = tmp_path / "fish.jsonl"
    rows = [
        {"task": "fish", "id": i, "context": f"N{i} is a", "choices": [" herring", " cod"], "label": 0} for i in "ab"
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        pico_directory("llama"), "--attention", "0..4/2", "--choosers", "leave-one-out", "greedy",
        "--emulations", "none", "low-rank", "--rank", 4, "--calibration", text, "--calibration-tokens", 256,
        "--score-tokens", 64, "--sequence-length", 32, "--choice", questions,
    ]  # fmt: skip


@pytest.mark.slow
def test_resumed_sweep_equals_an_uninterrupted_one(request_words, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *request_words, "--output", tmp_path / "whole") == 0
    whole = json.loads((tmp_path / "whole" / "sweep.json").read_text())
    fitted = []
    fit = sweep.fit_plans

    def counting(evaluator, plans, *arguments):
        if stop_after is not None and len(fitted) >= stop_after:
            raise KeyboardInterrupt
        fitted.extend(plans)
        return fit(evaluator, plans, *arguments)

    monkeypatch.setattr(sweep, "fit_plans", counting)
    monkeypatch.setattr(sweep, "PLANS_AT_ONCE", 2)
    stop_after = 2
    assert run(monkeypatch, *request_words, "--output", tmp_path / "parts") == 130
    assert "the same line goes on" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()
    stop_after = None
    assert run(monkeypatch, *request_words, "--output", tmp_path / "parts") == 0
    distinct = {tuple(sorted(plan)) for plan in fitted}
    assert len(fitted) == len(distinct), "a finished plan was fitted again, or one that two choosers share"
    parts = json.loads((tmp_path / "parts" / "sweep.json").read_text())
    for document in (whole, parts):
        for point in document["points"]:
            point.pop("fit_seconds")
    assert parts["points"] == whole["points"]
    assert parts["orders"] == whole["orders"]


def test_points_and_report(request_words, tmp_path, monkeypatch):
    output = tmp_path / "sweep"
    assert run(monkeypatch, *request_words, "--output", output) == 0
    found = json.loads((output / "sweep.json").read_text())
    assert len(found["points"]) == 2 * 2 * 3
    for point in found["points"]:
        kept = 6 - point["removed"]
        assert point["kv_per_token"] * 6 == point["kv_per_token_dense"] * kept
        if point["removed"] == 0:
            assert point["loss_increase"]["value"] == pytest.approx(0, abs=1e-6)
            assert point["tasks"]["fish"]["difference"]["value"] == 0
        else:
            assert point["loss_increase"]["value"] != 0
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "currentColor" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href", "href")), "the page needs another file"
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two figures share an id"
    for used in re.findall(r"url\(#([^)]+)\)", page):
        assert used in ids


def test_budgets():
    assert parse_budgets("0..20/5", 30) == [0, 5, 10, 15, 20]
    assert parse_budgets("4,2,8", 30) == [2, 4, 8]
    for bad in ("", "a", "3..1", "0..30", "5-7"):
        with pytest.raises(RecipeError):
            parse_budgets(bad, 30)


def point(removed, loss, kv=None):
    return {"chooser": "c", "emulation": "e", "removed": removed, "loss_increase": {"value": loss},
            "kv_per_token": 30 - removed if kv is None else kv}  # fmt: skip


def test_knee_is_where_the_curve_turns_up():
    flat_then_steep = [point(n, 0.01 * n if n <= 8 else 0.08 + 0.5 * (n - 8)) for n in range(13)]
    assert knees(flat_then_steep) == {"c, e": 8}
    assert knees([point(0, 0.0), point(5, 1.0)]) == {}


def test_pareto_front_drops_what_is_beaten():
    points = [point(0, 0.0, 30), point(5, 0.1, 25), point(5, 0.3, 25), point(6, 0.05, 24), point(10, 1.0, 20)]
    assert [(p["kv_per_token"], p["loss_increase"]["value"]) for p in pareto(points)] == [
        (30, 0.0),
        (24, 0.05),
        (20, 1.0),
    ]
