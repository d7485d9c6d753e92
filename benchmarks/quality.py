"""Quality of pruned models beside their dense model: perplexity, knowledge, and generation, on the same items.

    python benchmarks/quality.py smollm2-135m CHECKPOINT... --data DIR --output FILE

DIR holds `wikitext2_raw_valid.txt`, `arc_easy`, `piqa` and `hellaswag.valid.jsonl`, `mmlu.val.jsonl` and
`mmlu.dev.jsonl`; lists to copy are made here. Rows are added to FILE as they come; the same line again goes on where
it stopped. `--windows 50% 30%` adds plans of windows by the product's defaults for these shares of the KV cache of a
request of `--context` tokens; rows of text should be as long then: `--row-tokens 8192 --tokens 16384`. Every difference
from the dense model has a 95% interval, paired by question or window. For a model in
memory: `battery` once, `dense = measured(...)` once, `row(battery, dense, measured(...))` for every pruned model.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine
from plans import window_plan

from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.choice import Answer, accuracy, answer, differences, judged
from pruning.evaluation.evaluate import load
from pruning.evaluation.generation import Recall, copy_prompts, recalled
from pruning.evaluation.paired import bootstrap, standard_error
from pruning.evaluation.questions import Question, read_letter_questions, read_questions
from pruning.evaluation.text import text_windows, token_losses
from pruning.models.checkpoint import MANIFEST
from pruning.texts.reading import read_text
from pruning.workdir import Journal

TASKS = ("arc_easy", "piqa", "hellaswag")


@dataclass(frozen=True)
class Battery:
    """What every model is asked.

    Attributes:
        windows: Text to predict, int64 [n, T].
        questions: Name -> multiple-choice questions.
        copies: Prompts whose continuation is known.
    """

    windows: torch.Tensor
    questions: dict[str, list[Question]]
    copies: list[Recall]

    @property
    def digest(self) -> str:
        """Of all items."""
        items = [
            self.windows.tolist(),
            {k: [repr(q) for q in v] for k, v in self.questions.items()},
            map(repr, self.copies),
        ]
        return hashlib.sha256(json.dumps([*items[:2], list(items[2])]).encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """What one model made of a battery: loss of each window (nats/token), log-likelihoods, lists copied right."""

    losses: list[float]
    loglikelihoods: dict[str, list[list[float]]]
    copied: list[bool]


def battery(
    tokenizer, data: Path, limit: int = 500, tokens: int = 20480, window: int = 512, copies: int = 200
) -> Battery:
    """Read the sets; at most `limit` questions of each, evenly spread."""
    windows = text_windows(read_text(data / "wikitext2_raw_valid.txt"), tokenizer, window, tokens)
    questions = {name: read_questions(data / f"{name}.valid.jsonl", limit) for name in TASKS}
    questions["mmlu_5shot"] = read_letter_questions(data / "mmlu.val.jsonl", data / "mmlu.dev.jsonl", 5, limit)
    return Battery(windows, questions, copy_prompts(copies, length=16, ahead=3, seed=0))


def measured(model, tokenizer, battery: Battery) -> Measured:
    """Ask a model everything; bfloat16 is about three times faster than float32 where the processor has it."""
    losses = token_losses(model, battery.windows).windows.tolist()
    found = {
        name: [list(one.loglikelihoods) for one in answer(model, tokenizer, questions)]
        for name, questions in battery.questions.items()
    }
    return Measured(losses, found, recalled(model, tokenizer, battery.copies))


def row(battery: Battery, dense: Measured, one: Measured) -> dict:
    """Figures of a model, with paired differences from the dense one."""
    increase = bootstrap([a - b for a, b in zip(one.losses, dense.losses, strict=True)])
    out: dict = {
        "perplexity": math.exp(math.fsum(one.losses) / len(one.losses)),
        "perplexity_ratio": increase.mapped(math.exp).as_dict(),
    }
    for name, questions in battery.questions.items():
        mine, theirs = (_answers(questions, each.loglikelihoods[name]) for each in (one, dense))
        out[name] = accuracy(mine) | differences(mine, theirs)
        if name == "mmlu_5shot":  # one letter each: acc_norm says the same
            out[name] = {key: value for key, value in out[name].items() if "norm" not in key}
    right, gap = [float(x) for x in one.copied], [a - b for a, b in zip(one.copied, dense.copied, strict=True)]
    out["copy"] = {
        "n": len(right), "acc": math.fsum(right) / len(right), "acc_stderr": standard_error(right),
        "acc_difference": bootstrap(gap).as_dict(),
    }  # fmt: skip
    return out


def _answers(questions: Sequence[Question], values: Sequence[Sequence[float]]) -> list[Answer]:
    return [judged(question, each) for question, each in zip(questions, values, strict=True)]


def remembered(journal: Journal, identity: str, battery: Battery, measure) -> tuple[Measured, float]:
    """The measurement of a model from the journal, else made now and kept; processor seconds it took."""
    key = [identity, battery.digest]
    if (known := journal.recall(key)) is None:
        start = time.process_time()
        found = measure()
        known = [found.losses, found.loglikelihoods, found.copied, round(time.process_time() - start, 1)]
        journal.keep(key, known)
    return Measured(*known[:3]), known[3]


def identity_of(name: str, dtype: str) -> str:
    """What tells two models apart: the manifest with all hashes, or the name of a dense model."""
    manifest = Path(name) / MANIFEST
    return f"{dtype} " + (hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="dense model")
    parser.add_argument("checkpoints", nargs="*", help="made from it")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", nargs="*", default=[], help="shares of the KV cache")
    parser.add_argument("--context", type=int, help="tokens of the request that these are shares of")
    parser.add_argument("--row-tokens", type=int, default=512, help="of the text")
    parser.add_argument("--limit", type=int, default=500, help="questions of each set")
    parser.add_argument("--tokens", type=int, default=20480, help="of the text")
    parser.add_argument("--copies", type=int, default=200, help="prompts of the copying task")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", type=Path, help="answers of every model; beside the output by default")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options, reporter = arguments(), Reporter()
    quiet_libraries()
    journal = Journal(options.cache or options.output.with_suffix(".journal"))
    loaded = load(options.model, options.dtype, "cpu", reporter)
    asked = battery(loaded.tokenizer, options.data, options.limit, options.tokens, options.row_tokens, options.copies)
    document = {
        "machine": machine(), "model": options.model, "dtype": options.dtype, "tokens": asked.windows.numel(),
        "questions": {name: len(questions) for name, questions in asked.questions.items()},
        "copies": len(asked.copies), "rows": [],
    }  # fmt: skip
    dense = None
    subjects: list[tuple[str, str | None]] = [(name, None) for name in (options.model, *options.checkpoints)]
    subjects += [(options.model, share) for share in options.windows]
    for name, share in subjects:
        place = options.output.with_suffix(".plans")
        plan = window_plan(name, share, place, reporter, context=options.context) if share else None

        def measure(name: str = name, plan: Path | None = plan) -> Measured:
            another = name != options.model or plan is not None
            subject = load(name, options.dtype, "cpu", reporter, plan and str(plan)) if another else loaded
            return measured(subject.model, subject.tokenizer, asked)

        label = "dense" if name == options.model else Path(name).resolve().name
        label = f"windows, {share} of the KV cache" if share else label
        with reporter.stage(label):
            found, seconds = remembered(journal, identity_of(str(plan or name), options.dtype), asked, measure)
        dense = dense or found
        document["rows"].append({"name": label, "cpu_seconds": seconds, **row(asked, dense, found)})
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(document["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
