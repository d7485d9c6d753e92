"""The report and the card of an export hold its numbers and need nothing else."""

import contextlib
import os
import re
import shlex
import subprocess
import sys

from pruning import cli, pipeline, request
from pruning.export.figures import STATES
from pruning.export.report import command, write_card, write_report
from pruning.models.checkpoint import read_manifest, verify, write_manifest
from pruning.recipe import Recipe


def manifest_of(pico_checkpoint):
    manifest = read_manifest(pico_checkpoint("llama")[0])
    manifest.recipe = {"importance": "cosine", "attention": 3, "calibration": ["a file.txt"]}
    manifest.importance = {"cosine": {f"attention.{b}": 0.1 * b for b in range(6)}}
    manifest.quality = {"dense_loss": 2.0, "removed_loss": 2.6, "pruned_loss": 2.25, "text": "held out"}
    manifest.sizes = {"weights_dense": 2**21, "weights": 2**20, "kv_per_token_dense": 600, "kv_per_token": 300}
    manifest.stages = {"score": {"seconds": 1.5, "peak_memory_bytes": float(2**20)}}
    return manifest


def test_report_shows_the_numbers_of_the_card(pico_checkpoint, tmp_path):
    manifest = manifest_of(pico_checkpoint)
    write_report(tmp_path, manifest)
    write_card(tmp_path, manifest)
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
    for text in (page, card):
        for number in ("7.389", "9.488", "1.2840", "600", "300", "0.5000"):
            assert number in text
        assert "prune-export llama" in text
    assert "'a file.txt'" in card
    assert page.count("<svg") == 3
    for colour in STATES.values():
        assert f"fill: {colour}" in page
    assert ">2.600<" in re.sub(r"\s", "", page)
    assert {p.name for p in tmp_path.glob("*.png")} == {"plan.png", "importance.png", "recovery.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
    assert not re.search(r'(src|href)="(?!#)', page), "the page needs another file"


def test_tasks_are_in_the_report_and_the_card(pico_checkpoint, tmp_path):
    manifest = manifest_of(pico_checkpoint)
    costs = {"chosen plan": {"arc.jsonl": 0.25, "code.txt": 0.125}, "code.txt": {"arc.jsonl": 0.75, "code.txt": 0.0625}}
    manifest.quality |= {"tasks": costs}
    write_report(tmp_path, manifest)
    write_card(tmp_path, manifest)
    page, card = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
    assert "| plan for code.txt alone | +0.7500 | +0.0625 |" in card
    for cell in ("chosen plan", "plan for code.txt alone", "+0.2500", "+0.0625"):
        assert f"<td>{cell}</td>" in page


def test_command_makes_the_same_recipe_again(pico_checkpoint, monkeypatch):
    recipe = Recipe(attention="3", recovery_aware=True, keep=[0, 2], calibration=["a file.txt", "b.txt"], rank=4)
    manifest = read_manifest(pico_checkpoint("llama")[0])
    manifest.recipe = recipe.model_dump(mode="json")
    asked = []
    monkeypatch.setattr(request, "checked_export", lambda model, recipe, output, **flags: asked.append(recipe))
    monkeypatch.setattr(pipeline, "run", lambda *arguments, **flags: None)
    with contextlib.suppress(SystemExit):
        cli.app.meta(shlex.split(command(manifest))[1:])
    assert asked == [recipe]


def test_report_files_are_covered_by_the_manifest(pico_checkpoint, tmp_path):
    manifest = manifest_of(pico_checkpoint)
    write_report(tmp_path, manifest)
    write_manifest(tmp_path, manifest)
    assert {"report.html", "plan.png"} <= set(verify(tmp_path).files)


def test_help_needs_neither_matplotlib_nor_torch():
    code = "import sys; from pruning import cli\n" \
           "try: cli.app.meta(['--help'])\nexcept SystemExit: pass\n" \
           "print(sorted({'matplotlib', 'torch', 'jinja2'} & set(sys.modules)), file=sys.stderr)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stderr.strip().splitlines()[-1] == "[]"
