"""FFNs that tokens skip: quality and rate on held-out text, and the time of a decoding step beside the dense model.

    python benchmarks/skipping.py smollm2-135m --calibration FILE... --text FILE \
        --output benchmarks/results/skipping.json

All rates are timed in one vLLM engine: its FFNs are told other thresholds, or to run as they are. Rounds go through the
rates to and fro. Steps are in seconds of the clock and of the processor; the latter are right on a busy machine too,
where one thread does the work.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from worker import Worker, start_worker

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.paired import bootstrap
from pruning.export.writing import copy_companions, pruned_config, state_dict, write_weights
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

    def write(self, made: Any, directory: Path) -> None:
        """Cut the plan out of the dense model, and write it as vLLM reads it."""
        plan = Plan(self.blocks, dict.fromkeys(made.emulations, "skip"))
        apply_recovery(self.dense.model, self.dense.family, plan, made)
        write_weights(state_dict(self.dense.model), directory)
        pruned_config(self.dense.model, self.dense.family).save_pretrained(directory)
        copy_companions(self.dense.directory, directory)


def told(thresholds: dict[str, float] | None, model: Any) -> None:
    """Have the FFNs of an engine's model skip by these thresholds (block -> threshold), or run as they are."""
    for block, layer in enumerate(model.model.layers):
        skipper = vars(layer.mlp).pop("kept_skipper", None) or vars(layer.mlp).pop("forward", None)
        if skipper is None:
            continue
        threshold = (thresholds or {}).get(str(block))
        vars(layer.mlp)["kept_skipper" if threshold is None else "forward"] = skipper
        skipper.threshold = threshold


def worker(options: dict[str, Any]) -> None:
    """Answer each line {"thresholds", "prompts", "new"} with the seconds that it took."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to the model
    from vllm import LLM, SamplingParams

    engine = LLM(
        options["directory"], dtype="float32", enforce_eager=True, max_model_len=options["context"],
        max_num_seqs=options["most"], enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        engine.apply_model(partial(told, job["thresholds"]))
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        seconds = []
        for new in (1, 1 + job["new"]):
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            start = time.perf_counter(), time.process_time()
            engine.generate(prompts, params, use_tqdm=False)
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        steps = [(after - before) / job["new"] for before, after in zip(*seconds, strict=True)]
        print(json.dumps({"step": steps[0], "cpu": steps[1]}), flush=True)


def time_steps(options: argparse.Namespace, directory: Path, rows: torch.Tensor, cells: dict[str, Any]) -> Any:
    """Milliseconds of a step at each batch: cell -> batch -> medians, and medians of paired ratios to dense."""
    settings = {"directory": str(directory), "context": options.prompt + options.new + 16, "most": max(options.batches)}
    one = Worker("skipping", start_worker(__file__, settings, threads=1))
    one.answer()
    taken: dict[str, dict[int, list[dict[str, float]]]] = {name: {b: [] for b in options.batches} for name in cells}
    for number in range(-1, options.rounds):  # the first pays for what is done once
        for name in list(cells) if number % 2 else reversed(cells):
            for batch in options.batches:
                prompts = rows[:batch, : options.prompt].tolist()
                found = one.ask({"thresholds": cells[name], "prompts": prompts, "new": options.new})
                taken[name][batch] += [found] if number >= 0 else []
    one.process.terminate()
    table: dict[str, Any] = {}
    for name, batches in taken.items():
        for batch, rounds in batches.items():
            base = taken["dense"][batch]
            table.setdefault(name, {})[str(batch)] = {
                f"{what}_{unit}": statistics.median(values)
                for what in ("step", "cpu")
                for unit, values in (
                    ("ms", [1000 * each[what] for each in rounds]),
                    ("over_dense", [mine[what] / theirs[what] for mine, theirs in zip(rounds, base, strict=True)]),
                )
            }
    return table


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(json.loads(sys.argv[2]))
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
    rows, last = [], None
    for rate in sorted(options.rates):
        last, expected = bench.fitted(rate)
        rows.append(bench.quality(rate, last, expected))
        rows[-1]["whole_ffns"] = bench.whole(rate)
        print({name: value for name, value in rows[-1].items() if "block" not in name}, flush=True)
    document = {
        "model": options.model, "machine": machine(), "rank": options.rank, "tokens": options.tokens,
        "calibration": [path.name for path in options.calibration], "text": options.text.name, "length": options.length,
        "score_tokens": options.score_tokens, "prompt": options.prompt, "new": options.new, "rounds": options.rounds,
        "cpu_seconds": round(time.process_time() - start), "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    if options.rounds:
        with tempfile.TemporaryDirectory() as place:
            bench.write(last, Path(place))
            cells = {"dense": None, **{f"{row['rate']:g}": dict(row["thresholds"]) for row in rows}}
            document["steps"] = time_steps(options, Path(place), bench.rows, cells)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document.get("steps"), indent=1))


if __name__ == "__main__":
    main()
