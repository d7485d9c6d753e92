"""The paper's table on a small model: every part is written, paired with dense, and not done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_quality import data_in

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paper.py"


@pytest.mark.slow
def test_every_part_is_written_once(pico_directory, tmp_path):
    data, output = data_in(tmp_path), tmp_path / "paper.json"
    words = [
        pico_directory("llama"), "--text", data / "wikitext2_raw_valid.txt", "--data", data, "--output", output,
        "--length", 64, "--score-tokens", 128, "--judge-tokens", 128, "--samples", 2, "--task-questions", 2,
        "--questions", 2, "--mmlu-questions", 3, "--shares", 0.33, 0.5, "--emulate", 0, 3, "--rank", 4,
        "--mmlu-plans", "attention cosine 0.33",
    ]  # fmt: skip

    def run():
        subprocess.run([sys.executable, SCRIPT, *map(str, words)], check=True, capture_output=True)
        return json.loads(output.read_text())

    found = run()
    assert len(found["scores"]) == 3 * 7
    assert len(found["losses"]) == 1 + 3 * 7 * 2
    assert {len(row) for row in found["losses"].values()} == {2}
    assert set(found["emulation"]) == {f"{block} {kind}" for block in (0, 3) for kind in ("none", "bias", "low_rank")}
    assert all(each["low"] <= each["value"] <= each["high"] for each in found["ratios"].values())
    assert set(found["accuracies"]["dense"]) == {"arc_easy", "hellaswag", "piqa", "mmlu"}
    assert found["accuracies"]["dense"]["arc_easy"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert set(found["accuracies"]["attention cosine 0.33"]) == {"arc_easy", "hellaswag", "piqa", "mmlu"}
    again = run()
    for part in ("scores", "losses", "emulation", "answers"):
        assert again[part] == found[part]
