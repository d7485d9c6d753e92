"""What each recovery technique gives, with its seconds and peak memory: one process a row, rows added to a JSON file.

python benchmarks/recovery.py smollm2-135m --calibration DIR/*.txt --judge TEXT --output FILE

`--technique window` limits the same layers to windows of an eighth of a row that judges, the product's default share.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine

from pruning.budget import WINDOW_SHARE
from pruning.console import Reporter, peak_memory_bytes, quiet_libraries
from pruning.evaluation.evaluate import loss, perplexity_ratio
from pruning.families import has_biases
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import DenseModel, load_dense
from pruning.plan import EmulationKind, Plan, Sublayer
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import Recovery, recover
from pruning.recovery.fuse import fuse
from pruning.recovery.healing import heal
from pruning.recovery.training import Optimizer, Settings, Trained
from pruning.search.algorithms import greedy, rank
from pruning.texts.calibration import from_files, other_windows
from pruning.texts.reading import read_text


@dataclass(frozen=True)
class Technique:
    """What `recover`, `fuse` and `heal` are asked for."""

    kind: EmulationKind
    rank: int = 64
    sources: int = 1
    sequential: bool = True
    compensated: bool = False
    fused: bool = False
    recalibrated: bool = False
    healed: Trained | None = None  # by HEALING_STEPS updates of HEALING_TOKENS tokens, on windows of the same texts
    optimizer: Optimizer = "adamw"
    window: int = 0


JUDGED_ROW = 512
HEALING_STEPS, HEALING_TOKENS, VALIDATION_WINDOWS = 60, 1024, 16

# Ranks 76 (low-rank), 51 (one source), 38 (two sources) and 30 (kv-share-low-rank) make adapters of a tenth of
# SmolLM2-135M's attention weights.
TECHNIQUES = {
    "window": Technique("window", window=JUDGED_ROW // WINDOW_SHARE),
    "window-compensated": Technique("window", compensated=True, window=JUDGED_ROW // WINDOW_SHARE),
    "none": Technique("none"),
    "bias": Technique("bias"),
    "self-only": Technique("self_only"),
    "low-rank-16": Technique("low_rank", 16),
    "low-rank-64": Technique("low_rank", 64),
    "low-rank-64-independent": Technique("low_rank", 64, sequential=False),
    "low-rank-128": Technique("low_rank", 128),
    "linear": Technique("linear"),
    "context-1": Technique("context", 51, 1),
    "context-2": Technique("context", 38, 2),
    "kv-share": Technique("kv_share", 64),
    "kv-share-low-rank": Technique("kv_share_low_rank", 30),
    "none-compensated": Technique("none", compensated=True),
    "low-rank-64-compensated": Technique("low_rank", 64, compensated=True),
    "low-rank-76-compensated": Technique("low_rank", 76, compensated=True),
    "context-1-compensated": Technique("context", 51, 1, compensated=True),
    "context-2-compensated": Technique("context", 38, 2, compensated=True),
    "low-rank-64-fused": Technique("low_rank", 64, fused=True),
    "linear-fused": Technique("linear", fused=True),
    "low-rank-64-compensated-fused": Technique("low_rank", 64, compensated=True, fused=True),
    "low-rank-64-recalibrated": Technique("low_rank", 64, recalibrated=True),
    "low-rank-76-compensated-recalibrated": Technique("low_rank", 76, compensated=True, recalibrated=True),
    "healed-adapters": Technique("low_rank", 76, compensated=True, recalibrated=True, healed="adapters"),
    "healed-adapters-spam": Technique(
        "low_rank", 76, compensated=True, recalibrated=True, healed="adapters", optimizer="spam"
    ),
    "healed-lora": Technique("low_rank", 76, compensated=True, recalibrated=True, healed="lora"),
    "low-rank-64-fused-recalibrated": Technique("low_rank", 64, fused=True, recalibrated=True),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True, help="text that no fit and no choice has seen")
    parser.add_argument("--judge-tokens", type=int, default=20480)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 49152])
    parser.add_argument("--attention", nargs="+", default=["6", "10"], help="counts to choose, or lists: 4,5,6")
    parser.add_argument("--among", help="candidates of a choice; all by default: 4,5,6")
    parser.add_argument("--choose", choices=["rank", "greedy"], default="rank")
    parser.add_argument("--score-tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of forward passes")
    parser.add_argument("--technique", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def attention_of(text: str) -> list[Sublayer]:
    return [Sublayer(int(block), "attention") for block in text.split(",")]


def windows_to_judge(dense, path: Path, tokens: int, length: int = JUDGED_ROW) -> torch.Tensor:
    ids = dense.tokenizer(read_text(path)[: tokens * 12], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:tokens]).view(-1, length)


def choose(dense, options, count: int) -> list[Sublayer]:
    tokens = from_files(options.calibration, dense.tokenizer, options.score_tokens, options.length, 1)
    evaluator = Evaluator(dense.model, dense.family, tokens)
    every = [Sublayer(b, "attention") for b in range(len(evaluator.blocks))]
    among = attention_of(options.among) if options.among else every

    def score(gone, rest):
        return {s: float(v.mean()) for s, v in evaluator.leave_one_out(rest, base=gone)[1].items()}

    return greedy(score, count, among) if options.choose == "greedy" else rank(score([], among), count, among)


def row(options, spec: dict) -> dict:
    """One row: load, fit, cut, judge; in a process of its own so that the peak is its own."""
    dense = load_dense(options.model, "float32", "cpu", Reporter())
    judged = windows_to_judge(dense, options.judge, options.judge_tokens)
    if spec["technique"] == "choose":
        start = time.perf_counter()
        with forwards(options):
            gone = choose(dense, options, int(spec["attention"]))
        chosen = ",".join(str(s.block) for s in gone)
        return {**spec, "chosen": chosen, "seconds": round(time.perf_counter() - start, 1)}
    fitted = {} if spec["technique"] == "dense" else recovered(dense, options, spec)
    with forwards(options):
        return {**spec, **fitted, "loss": loss(dense.model, dense.family, judged)}


def forwards(options) -> torch.autocast:
    """Forward passes in the arithmetic asked for; not around training: its weights change under the casts kept."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16")


def windows_to_heal_on(
    dense: DenseModel, files: list[Path], tokens: int, fitted: torch.Tensor, validation: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows that were fitted on and, of `tokens` tokens of the same files, the others; and some to judge by."""
    pool = other_windows(files, dense.tokenizer, tokens, fitted.shape[1], fitted)
    return torch.cat([fitted, pool[validation:]]), pool[:validation]


def healed(
    dense: DenseModel, options, how: Technique, plan: Plan, recovery: Recovery, fitted: torch.Tensor
) -> Recovery:
    """Train, on the windows that were fitted on and others of the same texts."""
    tokens = HEALING_STEPS * HEALING_TOKENS + VALIDATION_WINDOWS * options.length
    rows, validation = windows_to_heal_on(dense, options.calibration, tokens, fitted, VALIDATION_WINDOWS)
    settings = Settings(
        how.healed, "kl", how.optimizer, 1e-3, 32, HEALING_STEPS, None, HEALING_TOKENS,
        "bf16" if options.precision == "bfloat16" else "no", 0,
    )  # fmt: skip
    return heal(dense.model, dense.family, plan, recovery, rows, validation, settings, Reporter())[0]


def recovered(dense: DenseModel, options, spec: dict) -> dict:
    """Fit a technique and cut the model, in place; what that took."""
    how = TECHNIQUES[spec["technique"]]
    tokens = from_files(options.calibration, dense.tokenizer, spec["tokens"], options.length, 0)
    gone = attention_of(spec["attention"])
    kinds = dict.fromkeys(gone, how.kind)
    plan = Plan(dense.model.config.num_hidden_layers, kinds, how.rank, how.sources, how.window)
    evaluator = Evaluator(dense.model, dense.family, tokens)
    removed = sum(sum(p.numel() for p in dense.model.model.layers[s.block].self_attn.parameters()) for s in gone)
    kept = sum(p.numel() for p in dense.model.parameters()) - removed
    resting, start, cpu = peak_memory_bytes(), time.perf_counter(), time.process_time()
    with forwards(options):
        if how.fused:
            recovery = fuse(
                evaluator, plan.removed, how.rank, Reporter(), biased=has_biases(dense.model.config),
                compensated=how.compensated, recalibrated=how.recalibrated,
            )  # fmt: skip
        else:
            recovery = recover(
                evaluator, plan.removed, how.rank, Reporter(), compensated=how.compensated, sequential=how.sequential,
                sources=how.sources, window=how.window, recalibrated=how.recalibrated,
            )  # fmt: skip
    if how.healed:
        recovery = healed(dense, options, how, plan, recovery, tokens)
    took = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "resting_mib": resting >> 20,
        "peak_mib": peak_memory_bytes() >> 20,
        "weights_changed": len(recovery.weights),
    }
    apply_recovery(dense.model, dense.family, plan, recovery)
    added = sum(p.numel() for p in dense.model.parameters()) - kept
    return {"removed": len(gone), **took, "adapters_share": round(added / removed, 4)}


def run_row(document: dict, spec: dict) -> dict:
    """The row from the file if it is there, else from a new process."""
    for known in document["rows"]:
        if spec.items() <= known.items():
            return known
    done = subprocess.run([sys.executable, *sys.argv, "--row", json.dumps(spec)], stdout=subprocess.PIPE, check=True)
    made = json.loads(done.stdout.splitlines()[-1])
    document["rows"].append(made)
    return made


def main() -> None:
    options = arguments()
    quiet_libraries()
    if options.row:
        print(json.dumps(row(options, json.loads(options.row))))
        return
    where = machine()
    document = {"machine": where, "model": options.model, "judge_tokens": options.judge_tokens,
                "precision": options.precision, "length": options.length, "rows": []}  # fmt: skip
    if options.output.exists():
        document["rows"] = json.loads(options.output.read_text())["rows"]

    def save() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")

    dense = run_row(document, {"technique": "dense"})
    save()
    for attention in options.attention:
        chooser = "given"
        if "," not in attention:
            spec = {"technique": "choose", "chooser": options.choose, "attention": attention}
            attention, chooser = run_row(document, spec)["chosen"], options.choose
        for tokens in options.tokens:
            for technique in options.technique:
                # Nothing is fitted, so the calibration size does not matter.
                size = 0 if technique in ("none", "self-only") else tokens
                spec = {"technique": technique, "chooser": chooser, "attention": attention, "tokens": size or 256}
                made = run_row(document, spec)
                made["ratio"] = round(perplexity_ratio(dense["loss"], made["loss"]), 4)
                save()
                print(made, flush=True)


if __name__ == "__main__":
    main()
