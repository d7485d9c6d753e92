"""Every chooser: which attention it removes, and what the model is then worth on text of another domain.

python benchmarks/choosers.py smollm2-135m --calibration c4.txt books.txt --judge TEXT --output FILE

With `--windows` each plan is judged a third time, its layers limited to an eighth of a row and not removed, and three
more searches choose with such windows in place. Rows are added to the JSON file as they come; the same line again goes
on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from recovery import windows_to_judge

from pruning.budget import WINDOW_SHARE
from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.tasks import TaskEvaluator, read_task
from pruning.forward.evaluator import Evaluator
from pruning.importance import METRICS, Sampling
from pruning.models.loading import load_dense
from pruning.plan import Unit, lowest, sublayers_of
from pruning.recovery.emulation import fit_candidates, fit_plan
from pruning.search.selection import Judge, score, select
from pruning.texts.calibration import from_files
from pruning.workdir import Journal

SEARCHES = {
    # name: metric, search, what is in place of removed layers, share of --score-tokens
    "greedy leave-one-out": ("leave-one-out", "greedy", "none", 1.0),
    "greedy kl": ("kl", "greedy", "none", 0.25),
    "evolutionary": ("leave-one-out", "evolutionary", "none", 0.25),
    "policy-gradient": ("leave-one-out", "policy-gradient", "none", 0.25),
    "recovery-aware greedy leave-one-out": ("leave-one-out", "greedy", "low_rank", 1.0),
    "recovery-aware greedy leave-one-out, a quarter of the text": ("leave-one-out", "greedy", "low_rank", 0.25),
    "recovery-aware greedy kl, a quarter of the text": ("kl", "greedy", "low_rank", 0.25),
    "windows leave-one-out": ("leave-one-out", "rank", "window", 1.0),
    "windows aumann-shapley": ("aumann-shapley", "rank", "window", 1.0),
    "windows greedy leave-one-out": ("leave-one-out", "greedy", "window", 1.0),
}
SLOW = {"kl", "loss-shapley", "logit-shapley", "task-shapley", "shapley"}  # metrics that get a quarter of the text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True, help="text that no fit and no choice has seen")
    parser.add_argument("--judge-tokens", type=int, default=6144)
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--fit-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--counts", nargs="+", type=int, default=[6, 10, 15])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--questions", type=Path, help="multiple-choice questions; task-shapley needs them")
    parser.add_argument("--choosers", nargs="+", choices=[*METRICS, *SEARCHES], metavar="CHOOSER")
    parser.add_argument("--windows", action="store_true", help="also judge each plan with windows, not removal")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.choosers is None:
        every = [name for name in (*METRICS, *SEARCHES) if options.questions or name != "task-shapley"]
        options.choosers = [name for name in every if options.windows or not name.startswith("windows ")]
    return options


class Results:
    """The JSON file; several processes may add to it in turn."""

    def __init__(self, path: Path, settings: dict) -> None:
        self.path, self.settings = path, settings

    def read(self) -> dict:
        if self.path.exists():
            return json.loads(self.path.read_text())
        return {"settings": self.settings, "scores": {}, "plans": {}, "losses": {}}

    def put(self, part: str, key: str, value: object) -> None:
        document = self.read()
        document[part][key] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(self.path)


def judges_of(dense, options, candidates, kind: str, share: float) -> list[Judge]:
    """Text to score on, in two halves of other files; what one is judged with is fitted on the other."""
    journal = Journal(options.output.with_suffix(".journal"), f"{options.model} {dense.model.dtype}")
    middle = -(-len(options.calibration) // 2)
    halves = options.calibration[:middle], options.calibration[middle:]

    def evaluator(half: int, tokens: int, seed: int, batch: int, **kept: Journal) -> Evaluator:
        rows = from_files(halves[half], dense.tokenizer, tokens, options.length, seed)
        return Evaluator(dense.model, dense.family, rows, batch, **kept)

    def adapters(half: int):
        kept: dict = {}
        fitting = evaluator(half, options.fit_tokens, 2, 2)

        def fitted(base):
            key = tuple(base)
            if key not in kept:
                kept.clear()
                size = window_of(options)
                kept[key] = fit_candidates(fitting, key, candidates, kind, options.rank, Reporter(), 1, size)
            return kept[key]

        return fitted

    tokens = round(share * options.score_tokens / 2)
    note = ", windows" if kind == "window" else ""  # files of earlier runs know the others without a note
    return [
        Judge(
            f"half {half}",
            evaluator(half, tokens, 1, 1, journal=journal),
            adapters=adapters(1 - half) if kind != "none" else None,
            fitted_on=f"{options.fit_tokens} tokens of half {1 - half}, rank {options.rank}{note}",
        )
        for half in (1, 0)
    ]


def questions(dense, options) -> Judge:
    """Questions to score on, as many as a quarter of the text has tokens."""
    some = read_task(options.questions, dense.tokenizer, options.score_tokens // 4)
    return Judge("questions", TaskEvaluator(dense.model, dense.family, some, dense.tokenizer))


def choose(dense, options, results: Results, chooser: str) -> None:
    """Plans of every count by one chooser."""
    units = [Unit(block, "attention") for block in range(dense.model.config.num_hidden_layers)]
    sampling = Sampling(seed=0, samples=1 if chooser == "shapley" else 2, depth=10)
    if chooser == "aumann-shapley":
        sampling = Sampling(seed=0, samples=4, depth=10)
    start = time.process_time()
    if chooser in METRICS:
        share = 0.25 if chooser in SLOW else 1.0
        text = judges_of(dense, options, units, "none", share)
        judges = [questions(dense, options)] if chooser == "task-shapley" else text
        values = score(judges, units, chooser, sampling, Reporter())[""].values
        results.put("scores", chooser, {str(unit): value for unit, value in values.items()})
        plans = {count: lowest(values, count, units) for count in options.counts}
    else:
        importance, search, kind, share = SEARCHES[chooser]
        judges = judges_of(dense, options, sublayers_of(units), kind, share)
        # What greedy and a ranking remove first does not depend on how many follow.
        counts = [max(options.counts)] if search in ("greedy", "rank") else options.counts
        found = {
            count: select(
                judges, [(units, count)], importance, search, sampling, Reporter(), generations=8, offspring=8
            ).order
            for count in counts
        }
        plans = {count: found.get(count, found[max(found)][:count]) for count in options.counts}
    entry = {str(count): [unit.block for unit in plan] for count, plan in plans.items()}
    results.put("plans", chooser, {**entry, "cpu_seconds": round(time.process_time() - start, 1)})


def judge(dense, options, results: Results, chooser: str) -> None:
    """Loss of a chooser's plans on the judging text, with nothing and with adapters in place."""
    judging = Evaluator(dense.model, dense.family, windows_to_judge(dense, options.judge, options.judge_tokens), 1)
    fitting = Evaluator(
        dense.model, dense.family,
        from_files(options.calibration, dense.tokenizer, options.fit_tokens, options.length, 0), 2,
    )  # fmt: skip
    plans = results.read()["plans"][chooser]
    wanted = {name_of(plans[str(count)]): sublayers_of(Unit(b, "attention") for b in plans[str(count)])
              for count in options.counts}  # fmt: skip
    known = results.read()["losses"]
    if "dense" not in known:
        results.put("losses", "dense", judging.loss({}).tolist())
    bare = {name: plan for name, plan in wanted.items() if f"none {name}" not in known}
    table = judging.values([dict.fromkeys(plan) for plan in bare.values()]) if bare else []
    for name, row in zip(bare, table, strict=True):
        results.put("losses", f"none {name}", row.tolist())
    for name, plan in wanted.items():
        for kind in emulations_of(options)[1:]:
            if f"{kind} {name}" not in known:
                size = window_of(options)
                emulations = fit_plan(fitting, dict.fromkeys(plan, kind), options.rank, Reporter(), 1, size)
                results.put("losses", f"{kind} {name}", judging.loss(emulations).tolist())


def window_of(options) -> int:
    """Positions of a window: the product's share of a row."""
    return options.length // WINDOW_SHARE


def emulations_of(options) -> list[str]:
    """What is in the place of the layers of a plan when it is judged."""
    return ["none", "low_rank", *(["window"] if options.windows else [])]


def name_of(blocks: list[int]) -> str:
    return ",".join(map(str, sorted(blocks)))


def ratio(document: dict, emulation: str, blocks: list[int]) -> float:
    losses, dense = (torch.tensor(document["losses"][key]) for key in (f"{emulation} {name_of(blocks)}", "dense"))
    return float((losses - dense).mean().exp())


def rank_correlation(one: dict[str, float], other: dict[str, float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor([scores[unit] for unit in one]).argsort().argsort().double() for scores in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def table(document: dict, counts: list[int], emulations: list[str]) -> str:
    lines = [
        "| chooser | " + " | ".join(f"{n}, {kind.replace('_', '-')}" for kind in emulations for n in counts) + " |",
        "|---" * (1 + len(emulations) * len(counts)) + "|",
    ]
    for chooser, plans in document["plans"].items():
        cells = [f"{ratio(document, e, plans[str(c)]):.3f}" for e in emulations for c in counts]
        lines.append(f"| {chooser} | " + " | ".join(cells) + " |")
    scores = document["scores"]
    for other in ("aumann-shapley", "taylor"):
        if {"shapley", other} <= set(scores):
            value = rank_correlation(scores["shapley"], scores[other])
            lines.append(f"\nRank correlation of {other} with shapley: {value:.2f}")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    quiet_libraries()
    dense = load_dense(options.model, options.dtype, "cpu", Reporter())
    settings = {
        "model": options.model, "dtype": str(dense.model.dtype)[6:],
        "calibration": [path.name for path in options.calibration],
        "judge": options.judge.name, "judge_tokens": options.judge_tokens, "score_tokens": options.score_tokens,
        "fit_tokens": options.fit_tokens, "rank": options.rank,
    }  # fmt: skip
    results = Results(options.output, settings)
    for chooser in options.choosers:
        if chooser not in results.read()["plans"]:
            choose(dense, options, results, chooser)
        judge(dense, options, results, chooser)
        print(f"{chooser} done", flush=True)
    print(table(results.read(), options.counts, emulations_of(options)))


if __name__ == "__main__":
    main()
