"""Weights of blocks cut by narrower FFNs, removed FFNs, removed blocks: perplexity over the dense model's, closed form.

    python benchmarks/ffn.py smollm2-135m --calibration FILE... --text FILE --output benchmarks/results/ffn.json

Shares are of the blocks' bytes, embeddings apart. Rows that the output holds already are not measured again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine

from pruning import narrowing
from pruning.console import Reporter, quiet_libraries
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import load_dense
from pruning.models.sizes import saved_bytes, weight_bytes
from pruning.plan import KINDS, Sublayer
from pruning.recipe import Recipe
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import recover
from pruning.stages import plan_of
from pruning.texts.calibration import from_files

METHODS = ("narrow", "uniform", "ffns", "blocks")


class Bench:
    """One model, its calibration tokens, and what is measured of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.reporter = options, Reporter()
        self.dense = self.load()
        self.tokens = from_files(options.calibration, self.dense.tokenizer, options.tokens, options.length, 0)
        self.rows = from_files([options.text], self.dense.tokenizer, options.score_tokens, options.length, 0)
        self.blocks_bytes = weight_bytes(self.dense.model.get_submodule(self.dense.family.blocks))
        self.orders = None
        self.dense_losses = self.losses()

    def load(self):
        """The dense model, anew: a measured plan is cut out of it."""
        return load_dense(self.options.model, "float32", "cpu", self.reporter)

    def half(self):
        """bfloat16 products, as `--fit-precision bfloat16`."""
        return torch.autocast("cpu", torch.bfloat16)

    def losses(self):
        """Of every row of the text, nats per token."""
        with self.half():
            return Evaluator(self.dense.model, self.dense.family, self.rows).loss({})

    def excess(self, share: float) -> int:
        """Bytes that have to go for a share of the blocks' bytes."""
        return math.ceil((1 - share) * self.blocks_bytes)

    def recipe(self, share: float) -> Recipe:
        """What `prune-export` would be asked for."""
        budget = 1 - self.excess(share) / weight_bytes(self.dense.model)
        return Recipe(emulation="narrow", weight_budget=f"{math.floor(budget * 1e6) / 1e4}%")

    def units(self):
        """Orders of all FFNs, found once."""
        if self.orders is None:
            evaluator = Evaluator(self.dense.model, self.dense.family, self.tokens)
            self.orders = narrowing.orders(evaluator, range(len(evaluator.blocks)), 0, self.reporter)
        return self.orders

    def narrow(self, share: float):
        """FFNs by predicted cost."""
        _, kept = narrowing.choose(self.dense, self.recipe(share), self.units(), self.reporter)
        return dict.fromkeys(kept, "narrow"), kept

    def uniform(self, share: float):
        """All FFNs of one width, its units chosen alike."""
        found = self.units()
        width = narrowing.uniform(self.dense, self.recipe(share), [sublayer.block for sublayer in found])
        return dict.fromkeys(found, "narrow"), {sublayer: each.kept(width) for sublayer, each in found.items()}

    def removed(self, share: float, kinds):
        """Whole sublayers or blocks, those whose removal alone costs least."""
        count = max(1, self.options.choice_tokens // self.options.length)
        evaluator = Evaluator(self.dense.model, self.dense.family, self.tokens[:count])
        plans = [{Sublayer(b, kind): None for kind in kinds} for b in range(len(evaluator.blocks))]
        costs = evaluator.values(plans).mean(1).tolist()
        gone, saved = {}, 0
        for number in sorted(range(len(plans)), key=costs.__getitem__):
            if saved < self.excess(share):
                gone |= dict.fromkeys(plans[number], "none")
                saved = sum(saved_bytes(self.dense, gone, 0, 1, fused=False).values())
        return gone, None

    def ffns(self, share: float):
        """FFNs that cost least."""
        return self.removed(share, ("ffn",))

    def blocks(self, share: float):
        """Blocks that cost least."""
        return self.removed(share, KINDS)

    def measure(self, method: str, share: float, compensated: bool) -> dict:
        """One row; the model is loaded anew afterwards."""
        start = time.process_time()
        find: Callable = getattr(self, method)
        with self.half():
            removed, prepared = find(share)
            evaluator = Evaluator(self.dense.model, self.dense.family, self.tokens)
            given = {"compensated": compensated, "prepared": prepared, "recalibrated": compensated}
            recovery = recover(evaluator, removed, 0, self.reporter, **given)
        units = {s.block: len(kept) for s, kept in (prepared or {}).items()}
        recipe = self.recipe(share).model_copy(update={} if prepared else {"emulation": "none"})
        plan = plan_of([], len(evaluator.blocks), recipe, removed, None, units)
        apply_recovery(self.dense.model, self.dense.family, plan, recovery)
        more = self.losses() - self.dense_losses
        left = weight_bytes(self.dense.model.get_submodule(self.dense.family.blocks)) / self.blocks_bytes
        self.dense = self.load()
        ratio = math.exp(float(more.mean()))
        return {
            "method": method, "share": share, "compensated": compensated, "blocks_bytes": left, "ratio": ratio,
            "standard_error": ratio * float(more.std()) / math.sqrt(len(more)), "units": units,
            "removed": [str(s) for s, kind in removed.items() if kind == "none"],
            "seconds": round(time.process_time() - start),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--tokens", type=int, default=65536, help="to choose and fit on")
    parser.add_argument("--choice-tokens", type=int, default=2048, help="to choose removed sublayers on")
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--compensate", action="store_true", help="also refit what is kept, and the final norm")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet_libraries()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    settings = ("model", "tokens", "choice_tokens", "score_tokens", "length")
    same = {name: getattr(options, name) for name in settings} | {"texts": [p.name for p in options.calibration]}
    bench = None
    for share in options.shares:
        for method in options.methods:
            key = {"method": method, "share": share, "compensated": options.compensate, **same}
            if any(all(row.get(name) == value for name, value in key.items()) for row in found["rows"]):
                continue
            bench = bench or Bench(options)
            row = same | bench.measure(method, share, options.compensate)
            found = {"machine": machine(), "rows": [*found["rows"], row]}
            temporary = options.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n")
            temporary.replace(options.output)
            print(f"{method} {share:.0%}: {row['ratio']:.3f} ({row['standard_error']:.3f}), {row['seconds']} s")


if __name__ == "__main__":
    main()
