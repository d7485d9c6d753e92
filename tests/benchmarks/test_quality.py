"""The quality battery on a small model: against itself nothing differs, and a second run asks nothing again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"


def data_in(directory: Path) -> Path:
    (directory / "wikitext2_raw_valid.txt").write_text("Herring swim in shoals of many thousands. " * 80)
    for task in ("arc_easy", "piqa", "hellaswag"):
        rows = [
            {"task": task, "id": i, "context": f"{task} {i}:", "choices": [" herring", " a cod"], "label": i % 2}
            for i in range(4)
        ]
        (directory / f"{task}.valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"subject": "fish", "question": f"Is {i} a fish?", "choices": ["yes", "no"], "label": 1} for i in range(5)]
    for name in ("val", "dev"):
        (directory / f"mmlu.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def rows_of(words: list, output: Path) -> list[dict]:
    subprocess.run([sys.executable, SCRIPT, *map(str, words), "--output", output], check=True, capture_output=True)
    return json.loads(output.read_text())["rows"]


@pytest.mark.slow
def test_rows_are_paired_and_resumed(pico_directory, pico_checkpoint, tmp_path):
    dense, (pruned, _) = pico_directory("llama"), pico_checkpoint("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (pruned / name).exists():
            (pruned / name).write_bytes((dense / name).read_bytes())
    words = [dense, pruned, "--data", data_in(tmp_path), "--tokens", 1024, "--copies", 4, "--dtype", "float32"]
    output = tmp_path / "quality.json"
    first = rows_of(words, output)
    same, other = first
    assert same["perplexity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert other["perplexity_ratio"]["value"] == pytest.approx(other["perplexity"] / same["perplexity"])
    assert abs(other["perplexity_ratio"]["value"] - 1) > 0.01
    assert other["perplexity_ratio"]["low"] <= other["perplexity_ratio"]["value"] <= other["perplexity_ratio"]["high"]
    for task in ("arc_easy", "piqa", "hellaswag", "mmlu_5shot", "copy"):
        assert set(same[task]["acc_difference"].values()) == {0}
        assert other[task]["acc_difference"]["value"] == pytest.approx(other[task]["acc"] - same[task]["acc"])
    kept = output.with_suffix(".journal").read_text()
    assert rows_of(words, output) == first
    assert output.with_suffix(".journal").read_text() == kept, "a model was asked again"
