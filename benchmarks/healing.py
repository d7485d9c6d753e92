"""What healing gives after the closed-form emulation, with its tokens, time and curve: a row added to a JSON file.

python benchmarks/healing.py smollm2-135m --calibration DIR/*.txt --judge TEXT --attention 4,6,7 --output FILE
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

from machine import machine
from recovery import attention_of, windows_to_heal_on, windows_to_judge

from pruning.console import Reporter, peak_memory_bytes, quiet_libraries
from pruning.evaluation.evaluate import loss, perplexity_ratio
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import load_dense
from pruning.plan import Plan
from pruning.recovery.apply import apply_recovery
from pruning.recovery.distillation import cut_copy
from pruning.recovery.emulation import recover
from pruning.recovery.healing import heal
from pruning.recovery.training import Settings
from pruning.texts.calibration import from_files


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", type=Path, required=True)
    parser.add_argument(
        "--judge", type=Path, help="text that no fit and no choice has seen; none: held-out figures only"
    )
    parser.add_argument("--judge-tokens", type=int, default=20480)
    parser.add_argument("--attention", required=True, help="blocks that lose it: 4,5,6")
    parser.add_argument("--emulation", default="low_rank")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="of the closed-form fit")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--compensate", action="store_true", help="refit kept output projections before training")
    parser.add_argument("--heal", choices=["adapters", "lora"], default="adapters")
    parser.add_argument("--heal-loss", choices=["kl", "next-token", "hidden"], default="kl")
    parser.add_argument("--optimizer", choices=["adamw", "spam"], default="adamw")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--validation", type=int, default=16, help="windows")
    parser.add_argument("--state", type=Path, help="file to resume from")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    quiet_libraries()
    reporter = Reporter()
    dense = load_dense(options.model, "float32", "cpu", reporter)
    fitted = from_files(options.calibration, dense.tokenizer, options.tokens, options.length, 0)
    rows, validation = windows_to_heal_on(dense, options.calibration, 10_000_000, fitted, options.validation)
    gone = attention_of(options.attention)
    plan = Plan(dense.model.config.num_hidden_layers, dict.fromkeys(gone, options.emulation), options.rank)
    start, cpu = time.perf_counter(), time.process_time()
    recovery = recover(
        Evaluator(dense.model, dense.family, fitted), plan.removed, plan.rank, reporter, compensated=options.compensate
    )
    given = {key: value for key, value in vars(options).items() if key not in ("output", "state", "calibration")}
    row = {**given, "judge": options.judge and options.judge.name, "files": [path.name for path in options.calibration]}
    row["fit_tokens"] = row.pop("tokens")
    row["fit_seconds"], row["fit_cpu_seconds"] = (
        round(time.perf_counter() - start, 1),
        round(time.process_time() - cpu, 1),
    )
    settings = Settings(
        options.heal, options.heal_loss, options.optimizer, options.rate, options.lora_rank, options.steps,
        options.minutes, options.batch_tokens, options.precision, 0,
    )  # fmt: skip
    cpu = time.process_time()
    healed, record = heal(
        dense.model, dense.family, plan, recovery, rows, validation, settings, reporter, state=options.state
    )
    row |= {"cpu_seconds": round(time.process_time() - cpu, 1), "peak_mib": peak_memory_bytes() >> 20, **record}
    if options.judge:
        judged = windows_to_judge(dense, options.judge, options.judge_tokens)
        base = loss(dense.model, dense.family, judged)
        untrained = cut_copy(dense.model, dense.family, plan, copy.deepcopy(recovery.emulations), recovery.weights)
        before = loss(untrained, dense.family, judged)
        apply_recovery(dense.model, dense.family, plan, healed)
        row["ratio_start"] = round(perplexity_ratio(base, before), 4)
        row["ratio_end"] = round(perplexity_ratio(base, loss(dense.model, dense.family, judged)), 4)
    where = machine()
    document = {"machine": where, "model": options.model, "rows": []}
    if options.output.exists():
        document["rows"] = json.loads(options.output.read_text())["rows"]
    document["rows"].append(row)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    json.dump({key: value for key, value in row.items() if key != "curve"}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
