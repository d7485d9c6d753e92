"""Choose then heal against tuning while pruning, at equal time of training: rows added to a JSON file.

    python benchmarks/prune_aware.py smollm2-135m --calibration FILE... --judge TEXT --minutes 10 20 40 --output FILE

Windows for 25% of the KV cache by default; `--weight-budget 80%` compares narrower FFNs instead.
Both are `prune-export` as it is: the same budget, text, rank and minutes; the search is made once. `--steps` in the
place of `--minutes` compares at equal updates. Rows that the output holds already are not measured again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from machine import machine

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.evaluate import load, on_text
from pruning.pipeline import run
from pruning.recipe import Recipe
from pruning.request import checked_export
from pruning.texts.calibration import from_files

METHODS = ("lora", "prune-aware")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True, help="text that no choice and no training has seen")
    parser.add_argument("--judge-tokens", type=int, default=16384)
    parser.add_argument("--kv-budget", default="25%")
    parser.add_argument("--weight-budget", help="of narrower FFNs, in the place of windows")
    parser.add_argument("--context", type=int, default=2048, help="of the budget; rows that judge are as long")
    parser.add_argument("--minutes", type=float, nargs="+", default=[], help="of training")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help="updates, in the place of minutes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--precision", choices=["auto", "bfloat16"], default="auto", help="of training")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=1024, help="rows of training")
    parser.add_argument("--tokens", type=int, help="to choose on; those of `prune-export` by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def recipe(options: argparse.Namespace, row: dict) -> Recipe:
    """What `prune-export` is asked for."""
    budget = {"kv_budget": options.kv_budget}
    if options.weight_budget:
        budget = {"weight_budget": options.weight_budget, "emulation": "narrow"}
    return Recipe(
        **budget, context=options.context, calibration=options.calibration, sequence_length=options.length,
        calibration_tokens=options.tokens, heal=row["method"], heal_minutes=row["minutes"], heal_steps=row["steps"],
        heal_batch_tokens=options.batch_tokens, heal_precision=options.precision, seed=options.seed,
    )  # fmt: skip


def measured(options: argparse.Namespace, row: dict, reporter: Reporter) -> dict:
    """One checkpoint: made, measured, and gone."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "checkpoint"
        request = checked_export(options.model, recipe(options, row), output, overwrite=False, reporter=reporter)
        manifest = run(request, output, dry_run=False, reporter=reporter)
        dense, subject = (load(name, "float32", "cpu", reporter) for name in (options.model, str(output)))
        rows = from_files([options.judge], dense.tokenizer, options.judge_tokens, options.context, 0)
        text = on_text(subject, dense, rows, options.seed, reporter)
    quality = manifest.quality
    healing = {key: value for key, value in quality["healing"].items() if key != "curve"}
    return {
        "ratio": text["ratio"], "kl": text["kl"], "healing": healing,
        **{name: quality.get(name) for name in ("codes", "codes_dense", "full_heads", "windows", "ffn_units")},
        "seconds": {name: stage["seconds"] for name, stage in manifest.stages.items()},
        "kv_share": manifest.sizes["kv_request"] / manifest.sizes["kv_request_dense"],
        "weight_share": manifest.sizes["weights"] / manifest.sizes["weights_dense"],
    }  # fmt: skip


def main() -> None:
    options = arguments()
    quiet_libraries()
    settings = (
        "model", "judge_tokens", "kv_budget", "weight_budget", "context", "precision", "batch_tokens", "length",
        "tokens", "seed",
    )  # fmt: skip
    same = {name: getattr(options, name) for name in settings}
    same |= {"judge": options.judge.name, "texts": [path.name for path in options.calibration]}
    document = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    budgets = [(minutes, None) for minutes in options.minutes] + [(None, steps) for steps in options.steps]
    for minutes, steps in budgets:
        for method in options.methods:
            row = same | {"method": method, "minutes": minutes, "steps": steps, "threads": torch.get_num_threads()}
            if any(row.items() <= known.items() for known in document["rows"]):
                continue
            row |= measured(options, row, Reporter())
            document = {"machine": machine(), "rows": [*document["rows"], row]}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            temporary = options.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1) + "\n")
            temporary.replace(options.output)
            how = f"{minutes:g} minutes" if minutes else f"{steps} steps"
            print(f"{method}, {how}: {row['ratio']}, KL {row['kl']}, codes {row['codes']}", flush=True)


if __name__ == "__main__":
    main()
