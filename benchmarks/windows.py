"""Windows at several budgets of KV cache: perplexity over dense, and codes found at several distances.

    python benchmarks/windows.py smollm2-135m --text FILE --context 8192 --budgets 50% 30% 25% 20% 15% --output FILE

Every plan is found by a chooser of the product with its defaults, which never sees the text that judges. Intervals
are 95%, paired by pieces of 512 tokens. Rows are added to FILE as they come; the same line again goes on where it
stopped. `--removal 67% 50%` adds removal with adapters at these budgets; `--figure FILE` draws both.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layer_orders import ORDERS, kept_layers
from machine import machine

from pruning import windows
from pruning.budget import counts, resolved, window_sizes
from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.long_context import score
from pruning.evaluation.paired import bootstrap
from pruning.evaluation.text import text_windows, token_losses
from pruning.models.finding import find_model
from pruning.models.loading import DenseModel, load_model
from pruning.models.sizes import predicted_bytes
from pruning.plan import Plan, layers_within, parse_share
from pruning.recipe import Recipe
from pruning.recovery.distillation import cut_copy
from pruning.search import heads
from pruning.search.selection import Judge
from pruning.stages import calibrate, choose, judges_of, plan_of, recovered
from pruning.texts.calibration import read_text
from pruning.texts.long_context import code_prompts
from pruning.windows.plans import Choice, exchanged
from pruning.workdir import Journal

CHOOSERS = ("auto", "several", "head", "layer", "exchange", *ORDERS)
"""The product's; with windows of several sizes at any budget; then with one size: by single heads; by whole layers;
heads exchanged on trial; whole layers by other orders."""
LABELS = {"auto": "windows", "head": "windows of one size, by KV head", "layer": "by layer"}
MEASURED = ("pieces", "late_pieces", "codes")
PIECE = 512  # tokens that one paired difference is the mean of


def measured(model: Any, dense: DenseModel, rows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Losses by piece, those past half of the row, and codes found by length."""
    losses = token_losses(model, rows).values
    half = losses.shape[1] // 2
    return {
        "pieces": [float(part.mean()) for row in losses for part in row.split(PIECE)],
        "late_pieces": [float(part.mean()) for row in losses for part in row[half:].split(PIECE)],
        "codes": found_codes(model, dense, options),
    }


def found_codes(model: Any, dense: DenseModel, options: argparse.Namespace) -> dict[str, list[int]]:
    """Length of the prompts -> codes found and hidden."""
    found = {}
    for length in options.lengths:
        prompts = code_prompts(dense.tokenizer, read_text(options.text), length, options.prompts, 11)
        scores = score(model, prompts)
        found[str(length)] = [sum(sum(each.found) for each in scores), sum(len(each.found) for each in scores)]
    return found


def ratio(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """exp of the mean difference and its interval."""
    gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
    return bootstrap(gaps).mapped(math.exp).as_dict()


def compared(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Perplexity over dense, of whole rows and past half of them, with intervals."""
    return {
        "perplexity": ratio(mine["pieces"], theirs["pieces"]), "late": ratio(mine["late_pieces"], theirs["late_pieces"])
    }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A plan and what found it."""

    budget: str
    how: str
    plan: Plan
    limits: windows.Limits
    seconds: float


def plans(dense: DenseModel, options: argparse.Namespace, reporter: Reporter) -> Iterator[Found]:
    """A plan for every budget and chooser, with the CPU seconds of its choice; what they share is computed once."""
    asked = Recipe(
        context=options.context, window=options.window, calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
    )  # fmt: skip
    recipe = resolved(asked, dense.model.config.max_position_embeddings)
    start = time.process_time()
    rows, _ = calibrate(dense, recipe, reporter)
    found = windows.limited(dense, recipe, rows, reporter)
    judges = windows.judges(dense, recipe, rows, found, Journal(None, ""), reporter)
    several = recipe.model_copy(update={"window_sizes": "several"})
    of_sizes = several if "several" in options.choosers else recipe
    least = min(parse_share(budget, "budgets") for budget in options.budgets)
    choice = replace(
        Choice.of(dense, of_sizes, judges, found, reporter, share=least), sizes=partial(window_sizes, recipe)
    )
    scored = time.process_time() - start
    for budget in options.budgets:
        for how in options.choosers:
            start = time.process_time()
            own = replace(choice, sizes=partial(window_sizes, several)) if how == "several" else choice
            full = _plan(how, own, parse_share(budget, "budgets"), judges, dense, rows, reporter)
            chosen, limits = choice.selection(full)
            plan = plan_of(chosen.order, len(choice.usual.layers), recipe, found=limits)
            own_seconds = time.process_time() - start
            yield Found(budget, how, plan, limits, own_seconds if how in ORDERS else scored + own_seconds)


def _plan(
    how: str, choice: Choice, budget: float, judges: Sequence[Judge], dense: DenseModel, rows: torch.Tensor,
    reporter: Reporter,
) -> heads.HeadPlan:  # fmt: skip
    """The plan of one chooser."""
    if how in ("auto", "several"):
        return choice.plan(budget)
    one = replace(choice, scores={1.0: choice.usual}, by="head")
    if how == "head":
        return one.plan(budget)
    if how == "exchange":
        return exchanged(one, one.plan(budget), judges, reporter)
    each = choice.each
    count = (choice.total - layers_within(budget, choice.total, choice.left)) // each
    if how == "layer":
        return heads.HeadPlan(heads.best_layers(choice.usual, choice.blocks, count))
    kept = kept_layers(how, count, choice, judges, dense, rows, reporter)
    return heads.HeadPlan(frozenset((block, head) for block in kept for head in range(each)))


def removals(dense: DenseModel, options: argparse.Namespace, reporter: Reporter) -> Iterator[tuple[str, Plan, Any]]:
    """Budget, plan and adapters of removal with the product's defaults, for the same bytes."""
    for budget in options.removal:
        asked = Recipe(emulation="low-rank", kv_budget=budget, context=options.context, calibration=options.calibration)
        recipe = resolved(asked, dense.model.config.max_position_embeddings)
        tokens, _ = calibrate(dense, recipe, reporter)
        judges = judges_of(dense, recipe, tokens, Journal(None, ""), reporter)
        wanted = counts(recipe, dense.model.config.num_hidden_layers)
        plan = plan_of(choose(judges, recipe, wanted, reporter).order, dense.model.config.num_hidden_layers, recipe)
        yield budget, plan, recovered(dense, plan, recipe, tokens, reporter).emulations


def figure(document: dict[str, Any], path: Path) -> None:
    """Perplexity over dense by share of the KV cache kept, windows beside removal."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "kv-quality", "axes.spines.top": False, "axes.spines.right": False}):
        canvas = Figure(figsize=(7, 3.6), layout="constrained")
        axes = canvas.subplots()
        for kind, colour in (("auto", "#3a9d5d"), ("head", "#8a6fd1"), ("layer", "#3b7dd8"), ("removal", "#d14b4b")):
            rows = [row for row in document["rows"].values() if row.get("kind") == kind]
            if not rows:
                continue
            points = sorted((100 * row["kv_ratio"], row["perplexity"]["value"]) for row in rows)
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=LABELS.get(kind, kind))
        axes.axhline(1, color="#888888", linewidth=0.8)
        axes.set_yscale("log")
        top = max(row["perplexity"]["value"] for row in document["rows"].values() if "kind" in row)
        ticks = [tick for tick in (1, 1.1, 1.2, 1.5, 2, 3, 5) if tick <= 1.05 * top]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("KV cache kept, % of a request")
        axes.set_ylabel("perplexity / dense")
        axes.legend(frameon=False)
        canvas.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="judges; never chosen on")
    parser.add_argument(
        "--calibration", type=Path, nargs="*", default=[], help="chosen on; the built-in text by default"
    )
    parser.add_argument("--calibration-tokens", type=int, help="chosen on; the default of the product's where absent")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--window", type=int)
    parser.add_argument("--budgets", nargs="+", default=["50%", "30%", "20%"])
    parser.add_argument("--removal", nargs="*", default=[], help="budgets of removal with adapters, to compare")
    parser.add_argument("--figure", type=Path, help="SVG to draw of all rows")
    parser.add_argument("--rows", type=int, default=2, help="of the context's length")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--prompts", type=int, default=2, help="of eight codes, for each length")
    parser.add_argument("--choosers", nargs="+", default=["head", "layer"], choices=CHOOSERS)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet_libraries()
    reporter = Reporter()
    dense = load_model(find_model(options.model, reporter), "auto", "auto")
    rows = text_windows(read_text(options.text), dense.tokenizer, options.context, options.rows * options.context)
    document = json.loads(options.output.read_text()) if options.output.exists() else {"rows": {}}
    document |= {"model": options.model, "machine": machine(), "piece": PIECE, "text": options.text.name}
    document |= {"held_out_rows": options.rows, "calibration": [path.name for path in options.calibration]}

    def keep(name: str, row: dict[str, Any]) -> None:
        document["rows"][name] = row
        options.output.write_text(json.dumps(document, indent=1) + "\n")

    if (known := f"dense, {options.context}") not in document["rows"]:
        keep(known, measured(dense.model, dense, rows, options))
    theirs = document["rows"][known]
    for found in plans(dense, options, reporter):
        plan = found.plan
        name = f"{found.budget}, {found.how}, {'sizes around' if plan.windows else 'windows of'} {plan.window}"
        name += f", {options.calibration_tokens} tokens" if options.calibration_tokens else ""
        if name in document["rows"]:
            continue
        heads_of_plan = {
            "window": plan.window, "limited": sorted(sublayer.block for sublayer in plan.removed),
            "full_heads": {str(block): list(some) for block, some in sorted(plan.full_heads.items())},
            "windows": {str(block): size for block, size in sorted(plan.windows.items())},
        }  # fmt: skip
        known = (row for row in document["rows"].values() if heads_of_plan.items() <= row.items())
        if same := next(known, None):
            mine = {key: same[key] for key in MEASURED}
        else:
            model = cut_copy(dense.model, dense.family, plan, found.limits.served, {})
            mine = measured(model, dense, rows, options)
        sizes = predicted_bytes(dense, plan, options.context)
        row = mine | heads_of_plan | {
            "kind": found.how, "budget": found.budget, "kv_ratio": sizes["kv_request"] / sizes["kv_request_dense"],
            "choice_cpu_seconds": round(found.seconds, 1),
            **compared(mine, theirs),
        }  # fmt: skip
        keep(name, row)
        reporter.say(
            f"{name}: KV {row['kv_ratio']:.3f}, perplexity {row['perplexity']['value']:.4f} "
            f"[{row['perplexity']['low']:.4f}, {row['perplexity']['high']:.4f}], late {row['late']['value']:.4f}, "
            f"codes {row['codes']} (dense {theirs['codes']})"
        )
    for budget, plan, emulations in removals(dense, options, reporter):
        name = f"{budget}, removal"
        if name in document["rows"]:
            continue
        mine = measured(cut_copy(dense.model, dense.family, plan, emulations, {}), dense, rows, options)
        sizes = predicted_bytes(dense, plan, options.context)
        row = mine | {
            "kind": "removal", "kv_ratio": sizes["kv_request"] / sizes["kv_request_dense"],
            "removed": sorted(sublayer.block for sublayer in plan.removed),
            **compared(mine, theirs),
        }  # fmt: skip
        keep(name, row)
        reporter.say(f"{name}: perplexity {row['perplexity']['value']:.3f}, codes {row['codes']}")
    if options.figure:
        figure(document, options.figure)


if __name__ == "__main__":
    main()
