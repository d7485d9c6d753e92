"""Other methods on the same work: KV bytes, weight bytes, perplexity over dense, codes found, seconds to make.

    python benchmarks/peers.py smollm2-135m --text FILE --output benchmarks/results/peers.json

Every peer is made from a recipe or from its paper (`source` names it, `differs` says what is not the paper's), chosen
on the text of this package, never on the text that judges. Rows are added to FILE as they come; the same line again
goes on where it stopped, and `--only NAME` asks for some. With `--data DIR` the accuracy on multiple-choice questions
is measured too. Seconds are CPU time of choice and fit, one thread.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from peer_attention import FIRST, cache_share, first_and_recent, laziest, lazy_ratios, quantised
from windows import PIECE, found_codes, plans, ratio

from pruning.budget import counts, resolved
from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.choice import accuracy, answer, differences, judged
from pruning.evaluation.questions import Question, read_questions
from pruning.evaluation.text import text_windows, token_losses
from pruning.families import head_dim
from pruning.models.finding import find_model
from pruning.models.loading import DenseModel, load_model
from pruning.models.sizes import predicted_bytes
from pruning.plan import layers_within
from pruning.recipe import Recipe
from pruning.recipes import find, read
from pruning.recovery.distillation import cut_copy, sharing_copy
from pruning.stages import calibrate, choose, judges_of, plan_of, recovered
from pruning.texts.calibration import read_text
from pruning.texts.shipped import DATA, documents, rows_to_choose_on
from pruning.workdir import Journal

WINDOW_SHARE = 8  # of the context, as the product's default
CHOSEN = ("auto", "head")
"""Choosers of the product as windows.py names them, what it takes by itself first."""
TASKS = ("arc_easy", "piqa", "hellaswag")
SMALLER: dict[str, Any] = {"calibration_tokens": 4096, "score_tokens": 2048, "sequence_length": 512}
"""What every recipe reads here: less than it says, so that a row takes two or three minutes of one core."""


@dataclass(frozen=True)
class Made:
    """A model to measure.

    Attributes:
        model: It.
        kv: KV bytes of a request of the context's length over those of dense with 16-bit numbers.
        weights: Weight bytes over those of dense.
        seconds: CPU time of choice and fit; None: shared with another row.
        note: What became of which layers.
    """

    model: Any
    kv: float
    weights: float = 1.0
    seconds: float | None = 0.0
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        kind: What it does to the KV cache.
        source: Paper or page.
        differs: What is not as there.
        make: The model.
    """

    kind: str
    source: str
    differs: str
    make: Callable[[], Made]


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Journals of earlier choices are not read inside the `with`, so that seconds are those of the work."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


class Bench:
    """The dense model, and every way to make another of it."""

    def __init__(self, dense: DenseModel, options: argparse.Namespace, reporter: Reporter) -> None:
        self.dense, self.options, self.reporter = dense, options, reporter
        self.context: int = options.context
        self.window = self.context // WINDOW_SHARE
        self.blocks = int(dense.model.config.num_hidden_layers)
        self._found: dict[str, Made] = {}
        self._lazy: tuple[list[float], float] | None = None

    def from_recipe(self, name: str, **changes: Any) -> Made:
        """What a recipe of this package gives, on the text of this package."""
        start = time.process_time()
        keys = read(find(name)) | SMALLER | changes
        texts = [DATA / document.file for document in documents() if document.use == "choose"]
        recipe = resolved(Recipe(**keys, calibration=texts, context=self.context), self.context)
        tokens, _ = calibrate(self.dense, recipe, self.reporter)
        judges = judges_of(self.dense, recipe, tokens, Journal(None, ""), self.reporter)
        order = choose(judges, recipe, counts(recipe, self.blocks), self.reporter).order
        plan = plan_of(order, self.blocks, recipe)
        recovery = recovered(self.dense, plan, recipe, tokens, self.reporter)
        seconds = time.process_time() - start
        sizes = predicted_bytes(self.dense, plan, self.context)
        emulations, weights = recovery.emulations, recovery.weights
        return Made(
            cut_copy(self.dense.model, self.dense.family, plan, emulations, weights),
            sizes["kv_request"] / sizes["kv_request_dense"], sizes["weights"] / sizes["weights_dense"], seconds,
            {"gone": [str(unit) for unit in order], "recipe": name, "changes": {**SMALLER, **changes}},
        )  # fmt: skip

    def windows(self, budget: str) -> Made:
        """The product's own choice within a budget; what its budgets share is computed for the first alone."""
        if budget not in self._found:
            budgets = [each for each in self.options.budgets if each not in self._found]
            asked = argparse.Namespace(
                context=self.context, window=None, calibration=[], calibration_tokens=None, budgets=budgets,
                choosers=["auto"],
            )  # fmt: skip
            with fresh_cache():
                for found in plans(self.dense, asked, self.reporter):
                    sizes = predicted_bytes(self.dense, found.plan, self.context)
                    full = sum(map(len, found.plan.full_heads.values()))
                    self._found[found.budget] = Made(
                        cut_copy(self.dense.model, self.dense.family, found.plan, found.limits.served, {}),
                        sizes["kv_request"] / sizes["kv_request_dense"], 1.0, found.seconds,
                        {"limited": len(found.plan.removed), "full_heads": full},
                    )  # fmt: skip
        return self._found[budget]

    def streaming(self, budget: float) -> Made:
        """Every layer keeps the first and the recent tokens, as many as the budget lets it."""
        size = int(budget * self.context)
        model = sharing_copy(self.dense.model)
        first_and_recent(model, self.dense.family, dict.fromkeys(range(self.blocks), size))
        return Made(model, size / self.context, note={"positions": size})

    def lazy(self, budget: float) -> Made:
        """The laziest layers keep the first and the recent tokens."""
        if self._lazy is None:
            start = time.process_time()
            rows = rows_to_choose_on(self.dense.tokenizer, self.context, 1)
            ratios = lazy_ratios(self.dense.model, self.dense.family, rows, self.window)
            self._lazy = ratios, time.process_time() - start
        left = self.window / self.context
        count = layers_within(budget, self.blocks, left)
        chosen = laziest(self._lazy[0], count)
        model = sharing_copy(self.dense.model)
        first_and_recent(model, self.dense.family, dict.fromkeys(chosen, self.window))
        kv = (self.blocks - count * (1 - left)) / self.blocks
        return Made(model, kv, 1.0, self._lazy[1], {"lazy": chosen, "positions": self.window})

    def pattern(self, local: int) -> Made:
        """So many layers with windows, then one without, from the first layer on."""
        full = [block for block in range(self.blocks) if block % (local + 1) == local]
        return self.from_recipe(
            "quick", attention=self.blocks - len(full), keep=full, importance="random", window=self.window,
            calibration_tokens=2048, sequence_length=1024,
        )  # fmt: skip

    def small(self, kind: str, budget: str | None = None) -> Made:
        """A cache of small numbers, of the dense model or of a plan with windows."""
        below = Made(self.dense.model, 1.0) if budget is None else self.windows(budget)
        model = sharing_copy(below.model)
        quantised(model, self.dense.family, kind)
        share = cache_share(kind, head_dim(self.dense.model.config))
        return Made(model, below.kv * share, 1.0, below.seconds, below.note)


def peers(bench: Bench) -> dict[str, Peer]:
    """Every row but the dense one."""
    recipe = bench.from_recipe
    text = "the text and how much of it; as the recipe says besides"
    found = {
        "ShortGPT, a quarter of the blocks": Peer(
            "blocks removed", "arXiv 2403.03853", text, partial(recipe, "shortgpt")
        ),
        "SLEB, a fifth of the blocks": Peer(
            "blocks removed", "arXiv 2402.09025", text, partial(recipe, "sleb", score_tokens=1024)
        ),
        "angular distance, a fifth of the blocks": Peer(
            "blocks removed", "arXiv 2403.17887", "nothing is healed afterwards, where the paper trains adapters",
            partial(recipe, "angular"),
        ),
        "FlexiGPT, a fifth of the blocks": Peer(
            "blocks share weights", "arXiv 2501.14713", "differences of rank 64 in closed form, where the paper trains",
            partial(recipe, "flexigpt"),
        ),
        "LLM-Drop, a third of attention": Peer(
            "attention removed", "arXiv 2406.15786", text, partial(recipe, "llm-drop")
        ),
        "ReplaceMe, a third of attention": Peer(
            "attention removed", "arXiv 2505.02819", text, partial(recipe, "linear-map")
        ),
        "LLM-BIP, a third of attention": Peer(
            "attention removed", "arXiv 2412.06419",
            "its bound on whole sublayers, where the paper drops channels and heads",
            partial(recipe, "llm-bip"),
        ),
        "policy gradient, a third of attention": Peer(
            "attention removed", "arXiv 2406.10576",
            "masks of whole sublayers, 8 steps of 8 masks on 1,024 tokens; the paper's are of channels and heads",
            partial(recipe, "policy-gradient", generations=8, offspring=8, score_tokens=1024),
        ),
        "a deeper look, a third of attention": Peer(
            "attention removed", "arXiv 2407.16286", text, partial(recipe, "deeper-look", score_tokens=1024)
        ),
        "5 of 6 layers local, fixed": Peer(
            "windows", "Gemma 3, arXiv 2503.19786", "the pattern alone: nothing is trained, and sinks are planted",
            partial(bench.pattern, 5),
        ),
    }  # fmt: skip
    for budget in bench.options.budgets:
        share = float(budget.rstrip("%")) / 100
        found[f"StreamingLLM, {budget}"] = Peer(
            "windows", "arXiv 2309.17453", f"all layers alike, {FIRST} first tokens; positions are those of the text",
            partial(bench.streaming, share),
        )  # fmt: skip
        found[f"LightTransfer, {budget}"] = Peer(
            "windows", "arXiv 2410.13846", "lazy layers chosen once on text, where the paper asks for every prompt",
            partial(bench.lazy, share),
        )  # fmt: skip
        found[f"Shoal, {budget}"] = Peer("windows", "this package", "", partial(bench.windows, budget))
    for kind, name in (("fp8", "fp8 e4m3"), ("int8", "int8 per token and head")):
        found[f"KV cache in {name}"] = Peer("small numbers", "vLLM", "emulated", partial(bench.small, kind))
        if bench.options.with_plan in bench.options.budgets:
            found[f"Shoal, {bench.options.with_plan}, and {name}"] = Peer(
                "both", "vLLM and this package", "emulated", partial(bench.small, kind, bench.options.with_plan)
            )
    return found


def measured(
    model: Any, dense: DenseModel, rows: torch.Tensor, questions: dict[str, list[Question]], options: argparse.Namespace
) -> dict[str, Any]:
    """Losses by piece, codes found by length, and answers; the prompts are those of windows.py."""
    losses = token_losses(model, rows).values
    answers = {
        name: [list(one.loglikelihoods) for one in answer(model, dense.tokenizer, each)]
        for name, each in questions.items()
    }
    pieces = [float(part.mean()) for row in losses for part in row.split(PIECE)]
    return {"pieces": pieces, "codes": found_codes(model, dense, options)} | ({"answers": answers} if answers else {})


def compared(
    mine: dict[str, Any], theirs: dict[str, Any], questions: dict[str, list[Question]]
) -> dict[str, Any]:  # fmt: skip
    """Perplexity over dense, and accuracies with paired differences."""
    out: dict[str, Any] = {"perplexity": ratio(mine["pieces"], theirs["pieces"])}
    for name, each in questions.items():
        if name in mine.get("answers", {}) and name in theirs.get("answers", {}):
            ours, dense = (
                [judged(q, v) for q, v in zip(each, one["answers"][name], strict=True)] for one in (mine, theirs)
            )
            out[name] = accuracy(ours) | differences(ours, dense)
    return out


def measured_already(options: argparse.Namespace, lengths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of the product's own plans that windows.py measured on the same text and prompts, by their names here."""
    if options.windows is None:
        return {}
    document = json.loads(options.windows.read_text())
    dense = document["rows"].get(f"dense, {options.context}")
    if dense is None or document["text"] != options.text.name or document["piece"] != PIECE:
        return {}
    count = options.rows * options.context // PIECE
    taken: dict[str, dict[str, Any]] = {}
    known = [row for row in document["rows"].values() if row.get("kind") in CHOSEN]
    for row in sorted(known, key=lambda each: (CHOSEN.index(each["kind"]), each["window"])):
        name = f"Shoal, {row['budget']}"
        if name in taken or row["budget"] not in options.budgets:
            continue
        if len(row["pieces"]) < count or not set(lengths) <= set(row["codes"]):
            continue
        taken[name] = {
            "pieces": row["pieces"][:count], "codes": {length: row["codes"][length] for length in lengths},
            "perplexity": ratio(row["pieces"][:count], dense["pieces"][:count]), "kind": "windows",
            "source": "this package", "differs": "", "kv_ratio": row["kv_ratio"], "weight_ratio": 1.0,
            "note": {"from": options.windows.name, "chooser": row["kind"], "window": row["window"]},
            "cpu_seconds": options.choice_seconds,
        }  # fmt: skip
    return taken


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="judges; never chosen on")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1, help="of the context's length")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096], help="that codes are hidden in")
    parser.add_argument("--prompts", type=int, default=2, help="of eight codes, for each length")
    parser.add_argument("--budgets", nargs="+", default=["50%", "30%", "20%"], help="of windows")
    parser.add_argument("--with-plan", default="30%", help="budget that small numbers come on top of")
    parser.add_argument("--data", type=Path, help="directory of question sets; without it none are asked")
    parser.add_argument("--questions", type=int, default=100, help="of each set")
    parser.add_argument("--windows", type=Path, help="results of windows.py, of which rows are taken over")
    parser.add_argument("--choice-seconds", type=float, help="CPU time of the choice in these, where it was noted")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these words")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options, reporter = arguments(), Reporter()
    quiet_libraries()
    dense = load_model(find_model(options.model, reporter), "auto", "auto")
    bench = Bench(dense, options, reporter)
    rows = text_windows(read_text(options.text), dense.tokenizer, options.context, options.rows * options.context)
    asked = TASKS if options.data else ()
    questions = {name: read_questions(options.data / f"{name}.valid.jsonl", options.questions) for name in asked}
    document = json.loads(options.output.read_text()) if options.output.exists() else {"rows": {}}
    document |= {"model": options.model, "machine": machine(), "piece": PIECE, "text": options.text.name}
    document |= {"context": options.context, "held_out_rows": options.rows, "precision": options.precision}

    def arithmetic() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if options.precision == "bfloat16" else nullcontext()

    def keep(name: str, row: dict[str, Any]) -> None:
        document["rows"][name] = row
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")

    if "dense" not in document["rows"]:
        with arithmetic():
            found = measured(dense.model, dense, rows, questions, options)
        keep("dense", found | {"kv_ratio": 1.0, "weight_ratio": 1.0})
    theirs = document["rows"]["dense"]
    for name, row in measured_already(options, list(theirs["codes"])).items():
        if name not in document["rows"]:
            keep(name, row)
    for name, peer in peers(bench).items():
        if name in document["rows"] or (options.only and not any(word in name for word in options.only)):
            continue
        with arithmetic():
            made = peer.make()
            mine = measured(made.model, dense, rows, questions, options)
        row = mine | compared(mine, theirs, questions) | {
            "kind": peer.kind, "source": peer.source, "differs": peer.differs, "kv_ratio": made.kv,
            "weight_ratio": made.weights, "note": made.note,
            "cpu_seconds": None if made.seconds is None else round(made.seconds, 1),
        }  # fmt: skip
        keep(name, row)
        each = row["perplexity"]
        reporter.say(
            f"{name}: KV {made.kv:.3f}, weights {made.weights:.3f}, perplexity {each['value']:.4f} "
            f"[{each['low']:.4f}, {each['high']:.4f}], codes {row['codes']} (dense {theirs['codes']}), "
            f"{row['cpu_seconds']} CPU s"
        )


if __name__ == "__main__":
    main()
