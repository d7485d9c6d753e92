"""FFNs that tokens skip: quality and rate on held-out text, and the time of a decoding step beside the dense model.

    python benchmarks/skipping.py smollm2-135m --calibration FILE... --text FILE \
        --output benchmarks/results/skipping.json

Steps are those of transformers with its KV cache, in float32; rounds go through the rates to and fro. They are in
seconds of the clock and of the processor; the latter are right on a busy machine too, where one thread does the work.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.paired import bootstrap
from pruning.forward.evaluator import Evaluator
from pruning.models.loading import load_dense
from pruning.plan import Plan
from pruning.recovery.apply import apply_recovery
from pruning.recovery.emulation import recover
from pruning.search.skips import chosen, cost, predicted
from pruning.texts.calibration import from_files
from pruning.variants.skip import counting


class Bench:
    """One model, predictors of what its FFNs change, and what is measured of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.reporter = options, Reporter()
        self.dense = load_dense(options.model, "float32", "cpu", self.reporter)
        read = self.dense.tokenizer, options.tokens, options.length, 0
        self.fitting = self.over(from_files(options.calibration, *read))
        self.rows = from_files([options.text], self.dense.tokenizer, options.score_tokens, options.length, 0)
        self.judging, self.blocks = self.over(self.rows), len(self.fitting.blocks)
        with self.half():
            self.found = predicted(self.fitting, range(1, self.blocks - 1), options.rank, 0, self.reporter)
            self.dense_losses = self.judging.loss({})

    def over(self, rows: torch.Tensor) -> Evaluator:
        return Evaluator(self.dense.model, self.dense.family, rows)

    def half(self):
        """bfloat16 products, as `--fit-precision bfloat16`."""
        return torch.autocast("cpu", torch.bfloat16)

    def fitted(self, rate: float):
        """The recovery at a rate, and its predicted cost."""
        runs = round(rate * self.blocks * self.fitting.windows * self.options.length)
        shares = chosen(self.found, runs)
        removed = dict.fromkeys(shares, "skip")
        with self.half():
            made = recover(self.fitting, removed, 0, self.reporter, compensated=False, prepared=shares)
        return made, cost(self.found, runs)

    def quality(self, rate: float, made: Any, predicted_cost: float) -> dict[str, Any]:
        """Perplexity over the dense model's, and how often FFNs were skipped."""
        with self.half(), counting(made.emulations, self.blocks) as rates:
            losses = self.judging.loss(made.emulations)
        explained = [each.explained for each in self.found.values()]
        return {
            "rate": rate, "skipped": rates["share"], "skipped_by_block": rates["blocks"], **self.increase(losses),
            "predicted_loss_increase": predicted_cost, "explained_median": statistics.median(explained),
            "thresholds": {each.block: module.threshold for each, module in made.emulations.items()},
        }  # fmt: skip

    def increase(self, losses: torch.Tensor) -> dict[str, Any]:
        """Over the dense model, nats per token, with its 95% interval over rows."""
        return {"loss_increase": bootstrap((losses - self.dense_losses).tolist()).as_dict()}

    def whole(self, rate: float) -> dict[str, Any]:
        """As many FFN runs spared by removing whole FFNs, with maps of the same rank: those predicted to cost least."""
        count = round(rate * self.blocks)
        gone = sorted(self.found, key=lambda each: float(self.found[each].costs.mean()))[:count]
        removed = dict.fromkeys(sorted(gone), "low_rank")
        with self.half():
            made = recover(self.fitting, removed, self.options.rank, self.reporter, compensated=False)
            losses = self.judging.loss(made.emulations)
        return {"rate": count / self.blocks, "removed": [each.block for each in removed], **self.increase(losses)}

    def time_steps(self, made: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What a decoding step of the whole model takes: rate -> batch -> medians, and ratios to dense."""
        blocks, place = self.judging.blocks, self.dense.family.ffn
        stock = {each.block: getattr(blocks[each.block], place) for each in made.emulations}
        plan = Plan(self.blocks, dict.fromkeys(made.emulations, "skip"))
        apply_recovery(self.dense.model, self.dense.family, plan, made)
        skipping = {block: getattr(blocks[block], place) for block in stock}
        cells: dict[str, dict[int, float]] = {"dense": {}, **{f"{row['rate']:g}": row["thresholds"] for row in rows}}
        taken: dict[str, dict[int, list[tuple[float, ...]]]] = {
            name: {b: [] for b in self.options.batches} for name in cells
        }
        for number in range(-1, self.options.rounds):  # the first pays for what is done once
            for name in list(cells) if number % 2 else reversed(cells):
                for block in stock:
                    setattr(blocks[block], place, (skipping if block in cells[name] else stock)[block])
                for sublayer, module in made.emulations.items():
                    module.threshold = cells[name].get(sublayer.block, module.threshold)
                for batch in self.options.batches:
                    found = self.step(self.rows[:batch, : self.options.prompt], made.emulations)
                    taken[name][batch] += [found] if number >= 0 else []
        return {name: {str(b): self.against(each, taken["dense"][b]) for b, each in batches.items()}
                for name, batches in taken.items()}  # fmt: skip

    @staticmethod
    def against(mine: list[tuple[float, ...]], dense: list[tuple[float, ...]]) -> dict[str, float]:
        """Medians of milliseconds, of their ratios to the dense model's, and of the share of FFN runs skipped."""
        found = {"skipped": statistics.median(each[2] for each in mine)}
        for number, what in enumerate(("clock", "processor")):
            found[f"{what}_ms"] = statistics.median(1000 * each[number] for each in mine)
            pairs = zip(mine, dense, strict=True)
            found[f"{what}_over_dense"] = statistics.median(one[number] / other[number] for one, other in pairs)
        return found

    @torch.inference_mode()
    def step(self, prompts: torch.Tensor, emulations: Any) -> tuple[float, ...]:
        """Seconds of one decoding step by the clock and of the processor, after these prompts; share of runs spared."""
        given = self.dense.model(prompts, use_cache=True)
        start = time.perf_counter(), time.process_time()
        with counting(emulations, self.blocks) as rates:
            for _ in range(self.options.new):
                word = given.logits[:, -1:].argmax(-1)
                given = self.dense.model(word, past_key_values=given.past_key_values, use_cache=True)
        taken = time.perf_counter() - start[0], time.process_time() - start[1]
        return taken[0] / self.options.new, taken[1] / self.options.new, rates["share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True, help="what perplexity is measured on")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.25, 0.3])
    parser.add_argument("--rank", type=int, default=64, help="of what tokens get instead")
    parser.add_argument("--tokens", type=int, default=8192, help="to fit on")
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt when steps are timed")
    parser.add_argument("--new", type=int, default=16, help="steps in one timing")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet_libraries()
    start, bench = time.process_time(), Bench(options)
    settings = ("model", "rank", "tokens", "length", "score_tokens", "prompt", "new", "rounds")
    document = {name: getattr(options, name) for name in settings} | {
        "machine": machine(), "calibration": [path.name for path in options.calibration], "text": options.text.name,
    }  # fmt: skip
    rows, last = [], None
    for rate in sorted(options.rates):
        last, expected = bench.fitted(rate)
        rows.append(bench.quality(rate, last, expected))
        rows[-1]["whole_ffns"] = bench.whole(rate)
        options.output.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
        print({name: value for name, value in rows[-1].items() if "block" not in name}, flush=True)
    document["rows"] = rows
    document["steps"] = bench.time_steps(last, rows) if options.rounds else {}
    document["cpu_seconds"] = round(time.process_time() - start)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["steps"], indent=1))


if __name__ == "__main__":
    main()
