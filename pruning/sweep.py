"""Quality over how much is removed, for several choosers and emulations: curves, their knees, and the Pareto front.

A chooser is a metric of `prune-export list` (scored once, so its plans are nested), or `greedy` (scored again after
every removal with --importance; nested as well). Everything is journalled, so a sweep that was stopped goes on.
"""

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pruning
from pruning.budget import Counts
from pruning.console import Reporter, quiet_libraries
from pruning.evaluation.choice import answer, judged
from pruning.evaluation.paired import bootstrap, standard_error
from pruning.evaluation.questions import Question, read_questions
from pruning.evaluation.text import text_windows
from pruning.export.report import write_sweep_report
from pruning.forward.evaluator import Evaluator
from pruning.importance import Sampling
from pruning.models.loading import DenseModel, load_model
from pruning.models.sizes import predicted_bytes
from pruning.models.surgery import apply_plan
from pruning.plan import Plan, Unit, sublayers_of
from pruning.recipe import Recipe, emulation_kind
from pruning.recovery.fitting import Fitted, fit_plans, together
from pruning.request import SweepRequest
from pruning.search import selection
from pruning.stages import calibrate, groups_of, journal_of, judges_of, table_of
from pruning.texts.reading import read_text
from pruning.workdir import Journal, atomic_directory

JUDGE_WINDOW = 512
PLANS_AT_ONCE = 12  # fitted in one walk; what a sweep that is stopped loses at most


def sweep(request: SweepRequest, output: Path, *, command: str, reporter: Reporter) -> dict[str, Any]:
    """Measure the curves; write `sweep.json`, `report.html` and its figures; `command` is named in both.

    Raises:
        UserError: What could not be known before the model was loaded; nothing is written then.
    """
    quiet_libraries()
    source, recipe, curves, budgets = request.source, request.recipe, request.curves, request.budgets
    num_blocks = source.num_blocks
    questions = [read_questions(path, curves.limit) for path in curves.choice]
    with reporter.stage("load"):
        dense = load_model(source, recipe.dtype, recipe.device)
    journal = journal_of(output, dense, recipe)
    with reporter.stage("calibrate"):
        tokens, held_out = calibrate(dense, recipe, reporter)
        if curves.judge is not None:
            held_out = text_windows(
                read_text(curves.judge, dense.tokenizer), dense.tokenizer, JUDGE_WINDOW, curves.judge_tokens
            )
    judging = Evaluator(dense.model, dense.family, held_out, journal=journal)
    with reporter.stage("dense"):
        base = judging.loss({})
        answers = [_answers(dense, each, journal, []) for each in questions]
    orders: dict[str, list[Unit]] = {}
    scores: dict[str, Any] = {}
    for name in curves.choosers:
        with reporter.stage(f"choose by {name}"):
            orders[name], seconds, found = _order(dense, recipe, name, max(budgets), tokens, journal, reporter)
            scores[name] = {"seconds": seconds, "importance": found}
    points: list[dict[str, Any]] = []
    judge = _Judge(dense, judging, questions, base.tolist(), answers, journal, recipe.context or 0)
    for emulation in curves.emulations:
        with reporter.stage(emulation):
            how = recipe.model_copy(update={"emulation": emulation})
            points += _points(judge, how, orders, budgets, tokens, reporter)
    document = {
        "shoal_version": pruning.__version__, "model": dense.name, "weight_hash": dense.weight_hash,
        "recipe": recipe.model_dump(mode="json"), "num_blocks": num_blocks,
        "judge": {"text": curves.judge.name if curves.judge else "held-out calibration windows",
                  "tokens": held_out.numel(), "window": held_out.shape[1], "dense_loss": float(base.mean())},
        "dense": {each[0].task: _share(found, each) for each, found in zip(questions, answers, strict=True)},
        "orders": {name: [str(unit) for unit in order] for name, order in orders.items()},
        "command": command, "scores": scores, "points": points, "knees": knees(points), "stages": dict(reporter.stages),
    }  # fmt: skip
    with atomic_directory(output) as directory:
        (directory / "sweep.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        write_sweep_report(directory, document, pareto(points))
    journal.discard()
    return document


def _order(
    dense: DenseModel, recipe: Recipe, chooser: str, count: int, tokens: Any, journal: Journal, reporter: Reporter
) -> tuple[list[Unit], float, dict[str, Any]]:
    """Units in order of removal, seconds it took (journalled with them), and the scores."""
    how, name = ("greedy", recipe.metric) if chooser == "greedy" else ("rank", chooser)
    key = ["order", how, name, count, recipe.model_dump_json(), _digest(tokens)]
    if (known := journal.recall(key)) is None:
        start = time.perf_counter()
        judges = judges_of(dense, recipe, tokens, journal, reporter)
        groups = groups_of(Counts(attention=max(1, count)), dense.model.config.num_hidden_layers, recipe.keep)
        sampling = Sampling(recipe.seed, recipe.draws, max(1, count))
        chosen = selection.select(judges, groups, name, how, sampling, reporter)
        known = [[unit.block for unit in chosen.order], time.perf_counter() - start, table_of(chosen.scores, name)]
        journal.keep(key, known)
    return [Unit(block, "attention") for block in known[0]], known[1], known[2]


def _digest(tokens: Any) -> str:
    return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Judge:
    """What plans are judged on, and what the dense model makes of it.

    Attributes:
        dense: The model.
        text: It on the text.
        questions: Sets of them.
        losses: Of the dense model, one a window, nats/token.
        answers: Its log-likelihoods, for each set.
        journal: What was measured before.
        context: Tokens of the request that KV bytes are counted for.
    """

    dense: DenseModel
    text: Evaluator
    questions: Sequence[list[Question]]
    losses: Sequence[float]
    answers: Sequence[list[list[float]]]
    journal: Journal
    context: int


def _points(
    judge: _Judge, recipe: Recipe, orders: Mapping[str, Sequence[Unit]], budgets: Sequence[int], tokens: Any,
    reporter: Reporter,
) -> list[dict[str, Any]]:  # fmt: skip
    """One point for every chooser and budget; choosers that agree on a plan share it, like plans are fitted at once."""
    kind, num_blocks = emulation_kind(recipe), len(judge.text.blocks)
    wanted = {
        (name, count): Plan(num_blocks, {s: kind for s in sublayers_of(order[:count])}, recipe.rank, recipe.sources)
        for name, order in orders.items() for count in budgets
    }  # fmt: skip
    fitted_on = [kind, recipe.rank, recipe.sources, _digest(tokens)] if kind != "none" else [kind]
    judged_on = [judge.text.text, [[q.id for q in each] for each in judge.questions]]

    def key(plan: Plan) -> list[Any]:
        return ["point", [str(s) for s in sorted(plan.removed)], fitted_on, judged_on]

    known = {str(key(plan)): judge.journal.recall(key(plan)) for plan in wanted.values()}
    missing = [plan for one, plan in {str(key(p)): p for p in wanted.values()}.items() if known[one] is None]
    fitting = Evaluator(judge.dense.model, judge.dense.family, tokens)
    with reporter.progress(f"plans, {recipe.kind}", len(missing)) as step:
        for group in together(fitting, [plan.removed for plan in missing], PLANS_AT_ONCE):
            some = [missing[number] for number in group]
            start = time.perf_counter()
            if kind == "none":
                fitted: list[Fitted] = [dict.fromkeys(plan.removed) for plan in some]
            else:
                fitted = fit_plans(fitting, [plan.removed for plan in some], recipe.rank, reporter, recipe.sources)
            seconds = (time.perf_counter() - start) / len(some) if kind != "none" else 0.0
            losses = judge.text.values(fitted).tolist()
            for plan, emulations, loss in zip(some, fitted, losses, strict=True):
                found = [_answers(judge.dense, each, judge.journal, [plan, emulations]) for each in judge.questions]
                known[str(key(plan))] = [loss, seconds, found]
                judge.journal.keep(key(plan), known[str(key(plan))])
                step.advance()
    return [_point(judge, name, recipe.kind, plan, known[str(key(plan))]) for (name, _), plan in wanted.items()]


def _answers(
    dense: DenseModel, questions: Sequence[Question], journal: Journal, cut: Sequence[Any]
) -> list[list[float]]:
    """Log-likelihoods of a question set by the dense model, or by a copy of it cut by [plan, emulations]."""
    key = ["dense answers", [[q.id, q.context, q.choices] for q in questions]]
    if not cut and (known := journal.recall(key)) is not None:
        return known
    model = dense.model
    if cut and cut[0].removed:
        model = copy.deepcopy(dense.model)
        apply_plan(model, dense.family, *cut)
    values = [list(one.loglikelihoods) for one in answer(model, dense.tokenizer, questions)]
    if not cut:
        journal.keep(key, values)
    return values


def _right(values: Sequence[Sequence[float]], questions: Sequence[Question]) -> list[float]:
    return [float(judged(q, v).correct_norm) for q, v in zip(questions, values, strict=True)]


def _share(values: Sequence[Sequence[float]], questions: Sequence[Question]) -> dict[str, float]:
    right = _right(values, questions)
    return {"n": len(right), "acc_norm": sum(right) / len(right), "acc_norm_stderr": standard_error(right)}


def _point(judge: _Judge, chooser: str, emulation: str, plan: Plan, known: Sequence[Any]) -> dict[str, Any]:
    losses, seconds, found = known
    increase = bootstrap([a - b for a, b in zip(losses, judge.losses, strict=True)])
    sizes = predicted_bytes(judge.dense, plan, judge.context)
    tasks = {}
    for each, mine, theirs in zip(judge.questions, found, judge.answers, strict=True):
        gap = [a - b for a, b in zip(_right(mine, each), _right(theirs, each), strict=True)]
        tasks[each[0].task] = _share(mine, each) | {"difference": bootstrap(gap).as_dict()}
    return {
        "chooser": chooser, "emulation": emulation, "removed": len(plan.removed),
        "loss_increase": increase.as_dict(), "fit_seconds": round(seconds, 2), "weights": sizes["weights"],
        "kv_per_token": sizes["kv_per_token"], "kv_per_token_dense": sizes["kv_per_token_dense"], "tasks": tasks,
    }  # fmt: skip


def knees(points: Sequence[dict[str, Any]]) -> dict[str, int]:
    """`chooser, emulation` -> budget after which the curve turns up.

    The point farthest below the chord from the first to the last point of loss increase over number removed.

    Source: Kneedle, Satopaa et al. 2011, without smoothing.
    """
    out = {}
    for name in sorted({(point["chooser"], point["emulation"]) for point in points}):
        curve = sorted(
            (point["removed"], point["loss_increase"]["value"])
            for point in points if (point["chooser"], point["emulation"]) == name
        )  # fmt: skip
        (x0, y0), (x1, y1) = curve[0], curve[-1]
        if len(curve) < 3 or x1 == x0 or y1 <= y0:
            continue
        below = {x: (x - x0) / (x1 - x0) - (y - y0) / (y1 - y0) for x, y in curve}
        out[", ".join(name)] = max(below, key=lambda x: below[x])
    return out


def pareto(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that no other beats in both KV bytes and loss, most bytes first."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["kv_per_token"], p["loss_increase"]["value"])):
        if not front or point["loss_increase"]["value"] < front[-1]["loss_increase"]["value"]:
            front.append(point)
    return front[::-1]
