"""Every benchmark, one after another; `make bench` is the short version, `make bench-full` the whole.

python benchmarks/run.py smollm2-135m models/smollm2-135m-pruned --short --results DIR
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pruning.texts.calibration import standard_library_text

HERE = Path(__file__).parent


def commands(
    model: str, pruned: list[str], texts: list[str], judge: str, data: str | None, results: Path, short: bool
) -> dict[str, list]:
    """Name -> words after `python`; texts to fit on and to judge on are never the same."""
    fit = ["--calibration", *texts, "--judge", judge]
    return {
        "recovery": [
            HERE / "recovery.py", model, *fit, "--output", results / "recovery.json",
            *(["--attention", "6", "--tokens", "2048", "--score-tokens", "512", "--judge-tokens", "2048",
               "--technique", "none", "low-rank-64"] if short else []),
        ],
        "choosers": [
            HERE / "choosers.py", model, *fit, "--output", results / "choosers.json",
            *(["--choosers", "cosine", "leave-one-out", "--counts", "6", "--score-tokens", "1024",
               "--fit-tokens", "2048", "--judge-tokens", "2048"] if short else []),
        ],
        "subnetworks": [
            HERE / "subnetworks.py", model, "--output", results / "subnetworks.json",
            *(["--tokens", "256", "--greedy-tokens", "256", "--count", "3"] if short else []),
        ],
        **({"quality": [
            HERE / "quality.py", model, *pruned, "--data", data, "--output", results / "quality.json",
            *(["--limit", "40", "--tokens", "2048", "--copies", "40"] if short else []),
        ]} if data else {}),
        "serving": [
            HERE / "serving.py", model, *pruned, "--output", results / "serving.json",
            *(["--rounds", "1", "--requests", "12", "--new", "64"] if short else []),
        ],
        "overhead": [
            HERE / "overhead.py", pruned[0], "--output", results / "overhead.json",
            *(["--pairs", "2"] if short else []),
        ],
        "speculation": [
            HERE / "speculation.py", model, *pruned, "--output", results / "speculation.json",
            *(["--short"] if short else []),
        ],
    }  # fmt: skip


def built_in_texts(directory: Path) -> tuple[list[str], str]:
    """The standard library's text, cut in two to fit on and one to judge on."""
    text = standard_library_text()
    third = len(text) // 3
    paths = [directory / f"text{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(text[i * third : (i + 1) * third], encoding="utf-8")
    return [str(path) for path in paths[:2]], str(paths[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("pruned", nargs="+", help="checkpoints made from it")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", help="some of them")
    parser.add_argument("--calibration", nargs="+", help="texts; Python's own documentation by default")
    parser.add_argument("--judge", help="text to judge on")
    parser.add_argument("--data", help="directory of question sets for quality.py, which is left out without it")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        texts, judge = built_in_texts(Path(directory))
        every = commands(options.model, options.pruned, options.calibration or texts, options.judge or judge,
                         options.data, options.results, options.short)  # fmt: skip
        wanted = {name: words for name, words in every.items() if words[0].exists()}
        for name in options.only or wanted:
            start = time.perf_counter()
            print(f"== {name}", flush=True)
            done = subprocess.run([sys.executable, *map(str, every[name])], check=False)
            print(f"== {name}: {time.perf_counter() - start:.0f} s, exit code {done.returncode}", flush=True)
            failed += [name] if done.returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
