"""Each `--effort` as a user types it: time as estimated and as it was, memory, and what the model is then worth.

    python benchmarks/efforts.py smollm2-135m --text FILE --kv-budget 50% --output benchmarks/results/efforts.json

Every effort runs `prune-export MODEL --kv-budget SHARE --effort NAME` in a process of its own, with the text of the
package, and is then judged on rows of FILE that no choice and no training saw. Rows are added to the JSON file as they
come; the same line again goes on where it stopped. `--options ...` go to every run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from windows import PIECE, compared, measured

from pruning.budget import resolved
from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.evaluate import load
from pruning.evaluation.text import text_windows
from pruning.models.checkpoint import MANIFEST
from pruning.models.finding import find_model
from pruning.models.loading import load_model
from pruning.recipe import Recipe
from pruning.texts.calibration import read_text

SAID = re.compile(r"^estimated time: (?:about )?(.*?) \(", re.MULTILINE)
UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds(text: str) -> float:
    """`3 min 25 s` as seconds."""
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+) (s|min|h)\b", text))


def exported(model: str, output: Path, words: list[str]) -> dict[str, float]:
    """Run `prune-export`; its estimate and its truth.

    Raises:
        SystemExit: It failed.
    """
    command = [str(Path(sys.executable).with_name("prune-export")), model, "--output", str(output), *words]
    log = output.with_suffix(".log")
    start = time.perf_counter()
    with log.open("wb") as file, tempfile.TemporaryDirectory() as cache:  # a search of before would be used again
        fresh = os.environ | {"XDG_CACHE_HOME": cache}
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=fresh)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall, said = time.perf_counter() - start, log.read_text(errors="replace")
    if child.returncode:
        raise SystemExit(said[-2000:])
    estimate = SAID.search(said)
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "wall_seconds": round(wall, 1),
        "estimated_seconds": seconds(estimate[1]) if estimate else float("nan"),
        "peak_mebibytes": usage.ru_maxrss // 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="judges; never chosen or trained on")
    parser.add_argument("--kv-budget", default="50%")
    parser.add_argument("--context", type=int, help="of a request; the default of prune-export where absent")
    parser.add_argument("--efforts", nargs="+", default=["quick", "balanced", "best"])
    parser.add_argument("--rows", type=int, default=2, help="of the context's length")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--prompts", type=int, default=2, help="of eight codes, for each length")
    parser.add_argument("--keep", type=Path, help="where checkpoints stay; dropped where absent")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for every run, such as --calibration")
    options = parser.parse_args()
    quiet_libraries()
    reporter = Reporter()
    dense = load_model(find_model(options.model, reporter), "auto", "auto")
    asked = Recipe(kv_budget=options.kv_budget, context=options.context)
    context = resolved(asked, dense.model.config.max_position_embeddings).context
    assert context is not None
    rows = text_windows(read_text(options.text), dense.tokenizer, context, options.rows * context)
    document: dict[str, Any] = {"rows": {}}
    if options.output.exists():
        document = json.loads(options.output.read_text())
    document |= {"model": options.model, "machine": machine(), "piece": PIECE, "text": options.text.name}

    def keep(name: str, row: dict[str, Any]) -> None:
        document["rows"][name] = row
        options.output.write_text(json.dumps(document, indent=1) + "\n")

    if (known := f"dense, {context}") not in document["rows"]:
        keep(known, measured(dense.model, dense, rows, options))
    theirs = document["rows"][known]
    for effort in options.efforts:
        name = f"{options.kv_budget}, {effort}"
        if name in document["rows"]:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            output = (options.keep or Path(temporary)) / f"{effort}-{options.kv_budget.rstrip('%')}"
            output.parent.mkdir(parents=True, exist_ok=True)
            words = ["--kv-budget", options.kv_budget, "--effort", effort, *options.options]
            words += ["--context", str(options.context)] if options.context else []
            row: dict[str, Any] = {"effort": effort, **exported(options.model, output, words)}
            sizes = json.loads((output / MANIFEST).read_text())["sizes"]
            subject = load(str(output), "auto", "auto", reporter)
            mine = measured(subject.model, dense, rows, options)
            del subject
        row |= mine | {
            "kv_ratio": sizes["kv_request"] / sizes["kv_request_dense"],
            **compared(mine, theirs),
        }  # fmt: skip
        keep(name, row)
        reporter.say(
            f"{name}: {row['cpu_seconds']} CPU s, estimated {row['estimated_seconds']:.0f}, perplexity "
            f"{row['perplexity']['value']:.4f}, codes {row['codes']} (dense {theirs['codes']})"
        )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    main()
