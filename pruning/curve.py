"""The curve before the choice: KV cache against perplexity and hidden codes, for every budget from one search."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from pruning import __version__, windows
from pruning.console import Reporter, quiet_libraries
from pruning.errors import RecipeError
from pruning.export.report import curve_table, write_curve
from pruning.forward import parallel
from pruning.models.loading import DenseModel
from pruning.plan import window_part
from pruning.recipe import Recipe, by_head
from pruning.request import Request
from pruning.search import heads
from pruning.stages import calibrate, forwards, join, journal_of, judges_of, opened
from pruning.windows.plans import BUDGETS, Choice
from pruning.workdir import Journal


def curve(request: Request, output: Path | None, *, measured: int, reporter: Reporter) -> dict[str, Any]:
    """Print, and save, what each budget costs.

    A plan's loss is predicted by first order: the sum of what its limited heads cost, in the scale of what limiting
    all of them costs on held-out rows of the context, which is measured.

    Args:
        request: A window plan's.
        output: Directory for `curve.json` and `report.html`; None: print only.
        measured: Points measured beside the two ends, spread over the curve.
        reporter: For progress.

    Returns:
        The document that is saved.

    Raises:
        UserError: What could not be known before the model was loaded.
    """
    quiet_libraries()
    join(reporter)
    recipe = request.recipe
    if not by_head(recipe):
        raise RecipeError("plan draws the curve of windows; leave out what chooses by another way (sweep removes)")
    with reporter.stage("load"):
        dense = opened(request.source, recipe)
    with reporter.stage("calibrate"):
        tokens, held_out = calibrate(dense, recipe, reporter)
    journal = journal_of(None, dense, recipe)
    with reporter.stage("score"), forwards(dense, recipe):
        found = windows.limited(dense, recipe, tokens, reporter)
        judges = judges_of(dense, recipe, tokens, journal, reporter, found=found)
        choice = Choice.of(dense, recipe, judges, found, reporter, share=0.0)
    with reporter.stage("measure"):
        document = {
            "shoal_version": __version__, "model": dense.name, "context": recipe.context, "window": recipe.window,
            "windows": _sizes(choice), "row_tokens": held_out.shape[1], "recipe": recipe.model_dump(mode="json"),
            **_points(dense, recipe, choice, held_out, measured, journal, reporter),
        }  # fmt: skip
    journal.discard()
    if parallel.process()[0] != 0:
        return document
    print(curve_table(document))
    if output is not None:
        write_curve(output, document)
        reporter.say(f"wrote {output}/report.html and curve.json")
    return document


def _points(
    dense: DenseModel, recipe: Recipe, choice: Choice, held_out: Tensor, measured: int, journal: Journal,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """The dense model's figures and a point for each budget, the smallest cache first."""
    figures = windows.Measured(dense, recipe, held_out, journal, reporter)
    least = choice.smallest
    shares = [share for share in BUDGETS if share > choice.share(least)]
    plans: dict[heads.HeadPlan, float] = {least: choice.share(least)}
    plans |= {plan: choice.share(plan) for plan in map(choice.plan, shares)}
    ends = figures.loss({}), figures.loss(choice.limits.by(least).served)
    whole = max(choice.first_order(least), 1e-9)
    chosen = _spread(len(plans) - 1, measured)
    points = []
    for number, (plan, share) in enumerate(plans.items()):
        limits_of_plan = choice.limits.by(plan)
        point: dict[str, Any] = {
            "kv_share": share,
            "full_heads": len(plan.full),
            "heads": choice.total,
            "limited_layers": len(limits_of_plan.served),
            "mixed_layers": len(limits_of_plan.full_heads()),
            "predicted_ratio": math.exp((ends[1] - ends[0]) * choice.first_order(plan) / whole),
        }
        if number == 0 or number - 1 in chosen:
            loss = ends[1] if number == 0 else figures.loss(limits_of_plan.served)
            point |= {"measured_ratio": math.exp(loss - ends[0])}
            point["codes"] = figures.codes(limits_of_plan.served)
        points.append(point)
        reporter.say(f"{share:.1%} of the KV cache: perplexity {point['predicted_ratio']:.4f} times dense, predicted")
    return {"dense_loss": ends[0], "codes_dense": figures.codes({}), "points": points}


def _sizes(choice: Choice) -> str:
    """The windows that plans are made of, for people."""
    sizes = sorted(window_part(next(iter(choice.limits.served.values())).size, size) for size in choice.scores)
    return "windows of " + " or ".join(f"{size:,}" for size in sizes)


def _spread(count: int, wanted: int) -> set[int]:
    """Numbers of `wanted` of `count` points, evenly spread."""
    wanted = min(count, wanted)
    return {(2 * i + 1) * count // (2 * wanted) for i in range(wanted)} if wanted else set()
