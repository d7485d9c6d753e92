"""Removed blocks with the weights of kept ones, beside blocks that are only gone; rows added to a JSON file.

python benchmarks/shared_blocks.py smollm2-135m --calibration DIR/*.txt --judge TEXT --order 13,14,5,17,26 --output FILE
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from machine import machine
from recovery import windows_to_heal_on, windows_to_judge

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.evaluate import loss, perplexity_ratio
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import DenseModel, load_dense
from pruning.models.sizes import predicted_bytes, weight_bytes
from pruning.plan import KINDS, EmulationKind, Plan, Sublayer
from pruning.recovery.distillation import cut_copy
from pruning.recovery.emulation import Recovery, recover
from pruning.recovery.healing import heal
from pruning.recovery.training import Settings
from pruning.texts.calibration import from_files
from pruning.variants import shared_fit as block_sharing
from pruning.variants.shared import SharedLinear


@dataclass(frozen=True)
class Row:
    """What is compared: how many blocks go, and what is done about it."""

    blocks: int
    kind: EmulationKind
    rank: int = 64
    compensated: bool = False
    weighed: bool = True
    scaled: bool = True
    heal: str | None = None


ROWS = {
    "4 none": Row(4, "none"),
    "5 none": Row(5, "none"),
    "5 shared 16": Row(5, "shared", 16),
    "5 shared 64": Row(5, "shared", 64),
    "5 shared 64, SVD of weights": Row(5, "shared", 64, weighed=False),
    "5 shared 64, not scaled": Row(5, "shared", 64, scaled=False),
    "5 shared 256": Row(5, "shared", 256),
    "4 none, compensated": Row(4, "none", compensated=True),
    "5 none, compensated": Row(5, "none", compensated=True),
    "5 shared 64, healed": Row(5, "shared", 64, heal="adapters"),
    "4 none, compensated, healed": Row(4, "none", compensated=True, heal="lora"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True, help="text that no fit and no choice has seen")
    parser.add_argument("--judge-tokens", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="of the closed-form fit")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--order", required=True, help="blocks, the first to go first: 13,14,5")
    parser.add_argument("--steps", type=int, default=30, help="updates of healing")
    parser.add_argument("--row", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def unweighed(difference, moment, *others):
    """The truncated SVD of the weights' difference itself."""
    return LOW_RANK(difference, torch.eye(len(moment)), *others)


LOW_RANK = block_sharing.low_rank


def judge(dense: DenseModel, plan: Plan, recovery: Recovery, judged: torch.Tensor, base: float) -> float:
    cut = cut_copy(dense.model, dense.family, plan, copy.deepcopy(recovery.emulations), recovery.weights)
    return round(perplexity_ratio(base, loss(cut, dense.family, judged)), 4)


def measured(dense: DenseModel, options, row: Row, fitted: torch.Tensor, judged: torch.Tensor, base: float) -> dict:
    order = [int(block) for block in options.order.split(",")]
    removed = {Sublayer(block, kind): row.kind for block in sorted(order[: row.blocks]) for kind in KINDS}
    plan = Plan(dense.model.config.num_hidden_layers, removed, row.rank)
    start = time.process_time()
    with patch.object(block_sharing, "low_rank", LOW_RANK if row.weighed else unweighed):
        evaluator = Evaluator(dense.model, dense.family, fitted)
        recovery = recover(evaluator, removed, row.rank, Reporter(), compensated=row.compensated)
    found: dict = {"fit_cpu_seconds": round(time.process_time() - start)}
    for emulation in recovery.emulations.values() if not row.scaled else ():
        for shared in emulation.modules():
            if isinstance(shared, SharedLinear) and shared.scale is not None:
                torch.nn.init.ones_(shared.scale)
    if row.heal:
        found["ratio_start"] = judge(dense, plan, recovery, judged, base)
        rows, validation = windows_to_heal_on(dense, options.calibration, 200_000, fitted)
        settings = Settings(row.heal, "kl", "adamw", 1e-3, 32, options.steps, None, 1024, "bf16", 0)
        start = time.process_time()
        recovery, record = heal(dense.model, dense.family, plan, recovery, rows, validation, settings, Reporter())
        found["heal_cpu_seconds"] = round(time.process_time() - start)
        found["kl"] = record["start"]["kl"], record["end"]["kl"]
    found["weights"] = round(predicted_bytes(dense, plan, 8192)["weights"] / weight_bytes(dense.model), 4)
    found["ratio"] = judge(dense, plan, recovery, judged, base)
    return found


def main() -> None:
    options = arguments()
    quiet_libraries()
    dense = load_dense(options.model, "float32", "cpu", Reporter())
    fitted = from_files(options.calibration, dense.tokenizer, options.tokens, options.length, 0)
    judged = windows_to_judge(dense, options.judge, options.judge_tokens)
    base = loss(dense.model, dense.family, judged)
    document = {"machine": machine(), "model": options.model,
                "order": options.order, "fit_tokens": fitted.numel(), "judge_tokens": judged.numel(),
                "steps": options.steps, "rows": {}}  # fmt: skip
    if options.output.exists():
        document["rows"] = json.loads(options.output.read_text())["rows"]
    for name in options.row:
        if name not in document["rows"]:
            document["rows"][name] = measured(dense, options, ROWS[name], fitted, judged, base)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            print(name, document["rows"][name], flush=True)


if __name__ == "__main__":
    main()
