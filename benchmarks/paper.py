"""A deeper look at depth pruning (arXiv 2407.16286), repeated on one model: what goes, by which metric, what is lost.

    python benchmarks/paper.py smollm2-135m --text FILE --data DIR --output benchmarks/results/paper.json

Attention, FFNs or whole blocks are removed, a tenth to a half of them, in the order of each metric. Metrics read the
text of this package, or every second question of a set; the other questions and the text judge. Values are added to
FILE as they come; the same line again goes on where it stopped, and `--parts` runs some of the work.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import machine

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.choice import loglikelihoods
from pruning.evaluation.paired import bootstrap
from pruning.evaluation.questions import Question, read_letter_questions, read_questions, spread
from pruning.evaluation.tasks import TaskEvaluator
from pruning.evaluation.text import text_windows
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling, Scores, metric
from pruning.models.finding import find_model
from pruning.models.loading import DenseModel, load_model
from pruning.plan import Plan, Sublayer, Unit, UnitKind, lowest, sublayers_of
from pruning.recovery.distillation import cut_copy
from pruning.recovery.emulation import fit_plan
from pruning.texts.calibration import read_text
from pruning.texts.shipped import rows_to_choose_on

KINDS: tuple[UnitKind, ...] = ("attention", "ffn", "block")
TEXT_METRICS = ("cosine", "relative-l1", "relative-l2", "logit-shapley", "loss-shapley", "random")
SETS = ("arc_easy", "hellaswag", "piqa")
MMLU = "mmlu"
PARTS = ("scores", "perplexity", "emulation", "questions", "mmlu")
ASKED = {"attention": (0.33,), "ffn": (0.33,), "block": (0.1,)}
"""Shares at which questions are asked, and by the metrics of `--asked`."""


class Results:
    """The JSON file, written after every value."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def part(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.document.setdefault(name, {})
        return found

    def put(self, part: str, key: str, value: object) -> None:
        self.part(part)[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        temporary.replace(self.path)


class Replication:
    """One model, its texts and its questions."""

    def __init__(self, dense: DenseModel, options: argparse.Namespace, results: Results, reporter: Reporter) -> None:
        self.dense, self.options, self.results, self.reporter = dense, options, results, reporter
        self.blocks = int(dense.model.config.num_hidden_layers)
        self.rows = rows_to_choose_on(dense.tokenizer, options.length, -(-options.score_tokens // options.length))
        judge = text_windows(read_text(options.text), dense.tokenizer, options.length, options.judge_tokens)
        self.judging = Evaluator(dense.model, dense.family, judge, 1)

    def count(self, share: float) -> int:
        """Units that a share is."""
        return round(share * self.blocks)

    def questions(self, name: str, half: int) -> list[Question]:
        """Every second question of a set: the first half chooses, the second judges."""
        every = read_questions(self.options.data / f"{name}.valid.jsonl")
        return spread(every[half::2], self.options.questions)

    def metrics(self) -> list[str]:
        """Of the table: those that read text, and one for each task."""
        return [*TEXT_METRICS, *(f"task-shapley {task}" for task in self.options.tasks)]

    def scored(self, kind: UnitKind, name: str) -> None:
        """Importance of every unit of a kind by one metric."""
        if (key := f"{kind} {name}") in self.results.part("scores"):
            return
        base, _, task = name.partition(" ")
        start = time.process_time()
        evaluator: Evaluator
        if task:
            some = spread(self.questions(task, 0), self.options.task_questions)
            evaluator = TaskEvaluator(self.dense.model, self.dense.family, some, self.dense.tokenizer)
        else:
            evaluator = Evaluator(self.dense.model, self.dense.family, self.rows, 1)
        units = [Unit(block, kind) for block in range(self.blocks)]
        sampling = Sampling(0, self.options.samples, self.count(0.33))
        found: Scores = metric(base).load()(evaluator, units, sampling, self.reporter)
        values = {str(unit.block): value for unit, value in found.values.items()}
        errors = {str(unit.block): value for unit, value in found.errors.items()}
        seconds = round(time.process_time() - start, 1)
        self.results.put("scores", key, {"values": values, "errors": errors, "cpu_seconds": seconds})

    def removed(self, kind: UnitKind, name: str, share: float) -> list[Sublayer]:
        """What goes of a kind by one metric."""
        scores = self.results.part("scores")[f"{kind} {name}"]["values"]
        units = [Unit(block, kind) for block in range(self.blocks)]
        return sublayers_of(lowest({unit: scores[str(unit.block)] for unit in units}, self.count(share), units))

    def plans(self) -> dict[str, list[Sublayer]]:
        """Name -> what is removed, the dense model first."""
        found: dict[str, list[Sublayer]] = {"dense": []}
        for kind in KINDS:
            for name in self.metrics():
                found |= {f"{kind} {name} {share:g}": self.removed(kind, name, share) for share in self.options.shares}
        return found

    def perplexity(self) -> None:
        """Loss of every plan on the judging text, one value a window; plans of one start share its forward."""
        known = self.results.part("losses")
        wanted = {name: gone for name, gone in self.plans().items() if name not in known}
        names = sorted(wanted, key=lambda name: wanted[name])
        for first in range(0, len(names), self.options.together):
            some = names[first : first + self.options.together]
            table = self.judging.values([dict.fromkeys(wanted[name]) for name in some])
            for name, row in zip(some, table.tolist(), strict=True):
                self.results.put("losses", name, row)
            self.reporter.say(f"perplexity: {first + len(some)} of {len(names)} plans")

    def emulation(self) -> None:
        """One block gone, with nothing, with a constant or with a low-rank map in the place of its two sublayers."""
        fitting = Evaluator(self.dense.model, self.dense.family, self.rows, 1)
        for block in self.options.emulate:
            gone = sublayers_of([Unit(block, "block")])
            for kind in ("none", "bias", "low_rank"):
                key = f"{block} {kind}"
                if key in self.results.part("emulation"):
                    continue
                modules: Any = dict.fromkeys(gone)
                if kind != "none":
                    modules = fit_plan(fitting, dict.fromkeys(gone, kind), self.options.rank, self.reporter)
                self.results.put("emulation", key, self.judging.loss(modules).tolist())

    def asked(self) -> dict[str, list[Sublayer]]:
        """The plans that questions are asked of."""
        every = self.plans()
        names = [
            f"{kind} {name} {share:g}"
            for kind, shares in ASKED.items()
            for share in shares
            for name in self.options.asked
            if f"{kind} {name} {share:g}" in every
        ]
        return {"dense": [], **{name: every[name] for name in names}}

    def ask(self, part: str, plans: dict[str, list[Sublayer]], sets: dict[str, list[Question]]) -> None:
        """Log-likelihoods of every choice."""
        labels = {name: [question.label for question in each] for name, each in sets.items()}
        lengths = {name: [[len(c) for c in question.choices] for question in each] for name, each in sets.items()}
        self.results.put("labels", part, labels)
        self.results.put("characters", part, lengths)
        for name, gone in plans.items():
            missing = [each for each in sets if f"{name} {each}" not in self.results.part("answers")]
            if not missing:
                continue
            plan = Plan(self.blocks, dict.fromkeys(gone, "none"))
            model = cut_copy(self.dense.model, self.dense.family, plan, dict.fromkeys(gone), {})
            for each in missing:
                found = loglikelihoods(model, self.dense.tokenizer, sets[each])
                self.results.put("answers", f"{name} {each}", [list(values) for values in found])
            self.reporter.say(f"{part}: {name}")

    def mmlu(self) -> list[Question]:
        """Five-shot MMLU."""
        data, many = self.options.data, self.options.mmlu_questions
        return read_letter_questions(data / "mmlu.val.jsonl", data / "mmlu.dev.jsonl", 5, many)


def _ratio(losses: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Perplexity over that of the other, paired by window."""
    return bootstrap([a - b for a, b in zip(losses, dense, strict=True)]).mapped(math.exp).as_dict()


def summarise(results: Results) -> None:
    """Ratios and accuracies with paired 95% intervals, from what is known so far."""
    losses, answers = results.part("losses"), results.part("answers")
    if dense := losses.get("dense"):
        results.document["ratios"] = {name: _ratio(each, dense) for name, each in losses.items() if name != "dense"}
        emulated = {name: _ratio(each, dense) for name, each in results.part("emulation").items()}
        results.document["emulation_ratios"] = emulated
    accuracies: dict[str, Any] = {}
    for part, labels in results.part("labels").items():
        characters = results.part("characters")[part]
        for each, right in labels.items():
            for key, found in answers.items():
                name, _, asked = key.rpartition(" ")
                if asked != each or f"dense {each}" not in answers:
                    continue
                normed = part != MMLU
                mine, theirs = (
                    _right(values, right, characters[each], normed) for values in (found, answers[f"dense {each}"])
                )
                gap = bootstrap([a - b for a, b in zip(mine, theirs, strict=True)]).as_dict()
                row = {"n": len(mine), "accuracy": sum(mine) / len(mine), "difference": gap}
                accuracies.setdefault(name, {})[each] = row
    results.document["accuracies"] = accuracies
    results.put("summary", "shares", results.document["settings"]["shares"])


def _right(
    answers: Sequence[Sequence[float]], labels: Sequence[int], characters: Sequence[Sequence[int]], normed: bool
) -> list[float]:
    """1 where the likeliest choice is the right one; `normed`: per character, as acc_norm."""
    found = []
    for values, label, lengths in zip(answers, labels, characters, strict=True):
        each = [value / length if normed else value for value, length in zip(values, lengths, strict=True)]
        found.append(float(each.index(max(each)) == label))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="judges; never chosen on")
    parser.add_argument("--data", type=Path, required=True, help="directory of question sets")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--score-tokens", type=int, default=2048)
    parser.add_argument("--judge-tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=8, help="subnetworks that Shapley metrics draw")
    parser.add_argument("--tasks", nargs="*", default=["arc_easy"], choices=SETS, help="that task-shapley reads")
    parser.add_argument("--task-questions", type=int, default=24)
    parser.add_argument("--questions", type=int, default=100, help="of each set that judge")
    parser.add_argument("--mmlu-questions", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.33, 0.5])
    parser.add_argument("--asked", nargs="+", default=["cosine", "loss-shapley", "task-shapley arc_easy"])
    parser.add_argument("--mmlu-plans", nargs="+", default=["attention cosine 0.33", "attention loss-shapley 0.33"])
    parser.add_argument("--emulate", type=int, nargs="*", default=[0, 1, 2, 3, 14, 27], help="blocks")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--together", type=int, default=8, help="plans evaluated in lock step")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options, reporter = arguments(), Reporter()
    quiet_libraries()
    dense = load_model(find_model(options.model, reporter), "auto", "auto")
    results = Results(options.output)
    replication = Replication(dense, options, results, reporter)
    kept = (
        "length",
        "score_tokens",
        "judge_tokens",
        "samples",
        "task_questions",
        "questions",
        "mmlu_questions",
        "rank",
    )
    settings = {name: getattr(options, name) for name in kept}
    settings |= {"text": options.text.name, "shares": options.shares, "tasks": options.tasks}
    settings |= {"precision": options.precision}
    results.document |= {"model": options.model, "machine": machine(), "settings": settings}

    def arithmetic() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if options.precision == "bfloat16" else nullcontext()

    def scores() -> None:
        for kind in KINDS:
            for name in replication.metrics():
                replication.scored(kind, name)
                reporter.say(f"scores: {kind} {name}")

    def questions() -> None:
        replication.ask("sets", replication.asked(), {name: replication.questions(name, 1) for name in SETS})

    def mmlu() -> None:
        every = replication.plans()
        some = {name: every[name] for name in ["dense", *options.mmlu_plans]}
        replication.ask(MMLU, some, {MMLU: replication.mmlu()})

    work: Sequence[tuple[str, Callable[[], None]]] = [
        ("scores", scores), ("perplexity", replication.perplexity), ("emulation", replication.emulation),
        ("questions", questions), ("mmlu", mmlu),
    ]  # fmt: skip
    for name, function in work:
        if name in options.parts:
            start = time.process_time()
            with arithmetic():
                function()
            spent = round(time.process_time() - start) + results.part("cpu_seconds").get(name, 0)
            results.put("cpu_seconds", name, spent)
            summarise(results)


if __name__ == "__main__":
    main()
