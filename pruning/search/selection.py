"""Score units on several texts and tasks, and choose with any search; with emulation in place where that is asked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from pruning.console import Reporter
from pruning.errors import RecipeError
from pruning.finite import check_numbers
from pruning.forward import parallel
from pruning.forward.evaluator import Evaluator
from pruning.forward.objective import Objective
from pruning.importance import Sampling, Scores, metric
from pruning.importance.activation import angular_runs
from pruning.plan import Sublayer, Unit, sublayers_of
from pruning.search import algorithms as search

SHORTLIST = 8  # units that greedy and exchange score at a time, where a metric scores each apart from the others
ROUNDS = 3  # times that exchange puts each removed unit back, at most

REFIT_EVERY = 3  # removals after which greedy fits all emulations anew

Adapters = Callable[[Sequence[Sublayer]], Mapping[Sublayer, nn.Module]]
"""(sublayers removed, in order) -> the emulation of every sublayer that may go, fitted with those removed."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A text or task that plans are judged on.

    Attributes:
        name: For people and the report.
        evaluator: The dense model on its tokens.
        weight: Its share of the whole.
        adapters: Emulations to judge with; none by default.
        fitted_on: What the adapters depend on, for the journal's key.
        gains: Whether a unit counts as less than nothing where the judge is better off without it. Where no judge's
            does, each judge's costs count as shares of their sum.
    """

    name: str
    evaluator: Evaluator
    weight: float = 1.0
    adapters: Adapters | None = None
    fitted_on: str = ""
    gains: bool = True

    def seen_from(self, base: Sequence[Unit]) -> Evaluator:
        """The model with `base` removed, and with emulations if plans are judged with them."""
        gone = [sublayer for unit in base for sublayer in unit.sublayers]
        if self.adapters is None:
            return self.evaluator.view(gone)
        # What went since the last fit is emulated as it was fitted when it was a candidate.
        return self.evaluator.view(gone, self.adapters(gone[: len(gone) // REFIT_EVERY * REFIT_EVERY]))


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen.

    Attributes:
        order: Units to remove; in the order of removal where the search has one, else by position.
        scores: Judge -> importance of every unit in the dense model, and "" -> their weighted mean.
    """

    order: list[Unit]
    scores: dict[str, Scores]


def score(
    judges: Sequence[Judge], units: Sequence[Unit], importance: str, sampling: Sampling, reporter: Reporter,
    base: Sequence[Unit] = (),
) -> dict[str, Scores]:  # fmt: skip
    """Importance of every unit for every judge, with `base` removed, and under "" their weighted mean."""
    function = metric(importance).load()

    def measured(judge: Judge) -> Scores:
        found = function(judge.seen_from(base), units, sampling, reporter)
        check_numbers({str(unit): value for unit, value in found.values.items()}, f"{importance} on {judge.name}")
        return found

    def scored(judge: Judge) -> Scores:
        if judge.adapters is None:
            return measured(judge)
        # Known scores spare the fits; without fits the evaluator's own journal is enough.
        key = ["scores", judge.evaluator.text, judge.fitted_on, importance, asdict(sampling), *_names(base, units)]
        journal = judge.evaluator.journal
        known = journal.recall(key)
        if parallel.everywhere(known is not None):
            values, errors = (dict(zip(units, row, strict=False)) for row in known)
            return Scores(values, errors)
        found = measured(judge)
        journal.keep(key, [[found.values[unit] for unit in units], [found.errors[u] for u in units if found.errors]])
        return found

    def clipped(judge: Judge) -> Scores:
        found = scored(judge)
        if judge.gains:
            return found
        return Scores({unit: max(0.0, value) for unit, value in found.values.items()}, found.errors)

    each = {judge.name: clipped(judge) for judge in judges}
    if any(judge.gains for judge in judges):
        total = sum(judge.weight for judge in judges)
        weights = [judge.weight / total for judge in judges]
    else:
        weights = weights_by_share(judges, [sum(each[judge.name].values.values()) for judge in judges])
    shares = [(weight, each[judge.name]) for weight, judge in zip(weights, judges, strict=True)]
    values = {unit: sum(share * scores.values[unit] for share, scores in shares) for unit in units}
    known = [unit for unit in units if all(unit in scores.errors for _, scores in shares)]
    errors = {unit: math.hypot(*(share * scores.errors[unit] for share, scores in shares)) for unit in known}
    return {"": Scores(values, errors), **(each if len(judges) > 1 else {})}


def weights_by_share(judges: Sequence[Judge], everything: Sequence[float]) -> list[float]:
    """Weights of the judges' costs, so that each counts as a share of `everything`, in units of the first judge.

    Judges differ in scale: limiting every layer costs a tenth of a nat a token on text and ten on hidden codes.
    """
    first = everything[0]
    return [
        judge.weight * (first / whole if min(first, whole) > 0 else 1.0)
        for judge, whole in zip(judges, everything, strict=True)
    ]


def _names(*several: Sequence[Unit]) -> list[list[str]]:
    return [[str(unit) for unit in units] for units in several]


def trade_off(
    judges: Sequence[Judge], groups: Sequence[tuple[Sequence[Unit], int]], chosen: Selection
) -> dict[str, dict[str, float]]:
    """What each task would choose for itself, and what that costs every task.

    Returns:
        "" (the plan chosen) and name of a judge (one shot, by its scores alone) -> judge -> cost minus that of the
        dense model, in the judge's own unit; emulations as the judge has them.
    """
    plans: dict[str, list[Unit]] = {"": list(chosen.order)}
    if len(judges) > 1:
        for judge in judges:
            plans[judge.name] = []
            for units, count in groups:
                taken = set(sublayers_of(plans[judge.name]))
                among = [unit for unit in units if not taken & set(unit.sublayers)]
                plans[judge.name] += search.rank(chosen.scores[judge.name].values, count, among)
    out: dict[str, dict[str, float]] = {name: {} for name in plans}
    for judge in judges:
        dense = float(judge.evaluator.loss({}).mean())
        view = judge.seen_from([])
        table = view.values([dict.fromkeys(sublayers_of(plan)) for plan in plans.values()]).mean(1)
        for name, cost in zip(plans, table.tolist(), strict=True):
            out[name][judge.name] = cost - dense
    return out


def select(
    judges: Sequence[Judge],
    groups: Sequence[tuple[Sequence[Unit], int]],
    importance: str,
    how: str,
    sampling: Sampling,
    reporter: Reporter,
    *,
    objective: Objective = "kl",
    generations: int = 20,
    offspring: int = 16,
) -> Selection:
    """Choose units to remove from every group, one group after another.

    Args:
        judges: Texts and tasks.
        groups: Candidates and how many of them go.
        importance: Metric of `rank`, `greedy` and `exchange`; where `evolutionary` starts.
        how: `rank`, `greedy`, `exchange`, `evolutionary`, `policy-gradient` or `consecutive`.
        sampling: For metrics and searches that draw.
        reporter: For progress.
        objective: What `evolutionary` and `policy-gradient` minimise.
        generations: Of `evolutionary`; steps of `policy-gradient`.
        offspring: Of a generation; masks of a step.

    Raises:
        RecipeError: The search does not fit the units.
    """
    everything = [unit for units, _ in groups for unit in units]
    scores = score(judges, everything, importance, sampling, reporter)
    whole = scores[""].values
    order: list[Unit] = []
    for units, count in groups:
        taken = set(sublayers_of(order))
        among = [unit for unit in units if not taken & set(unit.sublayers)]
        fixed = tuple(order)
        if how == "rank":
            order += search.rank(whole, count, among)
        elif how in ("greedy", "exchange"):
            rescore = _rescorer(judges, importance, sampling, reporter, fixed, whole)
            shortlist = SHORTLIST if metric(importance).apart else None
            found = search.greedy(rescore, count, among, shortlist)
            order += found if how == "greedy" else search.exchange(rescore, found, among, ROUNDS, shortlist)
        elif how == "consecutive":
            order += _run(judges[0].evaluator, among, count, reporter)
        elif how == "evolutionary":
            start = search.rank(whole, count, among)
            fitness = _fitness(judges, objective, reporter, fixed)
            order += search.evolutionary(fitness, start, among, sampling.seed, generations, offspring)
        else:
            fitness = _fitness(judges, objective, reporter, fixed)
            order += search.policy_gradient(fitness, count, among, sampling.seed, generations, offspring)
    return Selection(order, scores)


def _rescorer(
    judges: Sequence[Judge], importance: str, sampling: Sampling, reporter: Reporter,
    fixed: Sequence[Unit], first: Mapping[Unit, float],
) -> search.Rescore:  # fmt: skip
    def rescore(gone: Sequence[Unit], rest: Sequence[Unit]) -> Mapping[Unit, float]:
        if not fixed and not gone:
            return first
        if gone:
            reporter.say(f"search: {gone[-1]} goes, {len(gone)} gone")
        return score(judges, rest, importance, sampling, reporter, [*fixed, *gone])[""].values

    return rescore


def _fitness(
    judges: Sequence[Judge], objective: Objective, reporter: Reporter, fixed: Sequence[Unit]
) -> search.Fitness:
    """Weighted cost of plans: stage 0 on an eighth of the batches, stage 1 on half, stage 2 on all.

    Emulations are those fitted on the dense model with `fixed` gone: plans are many, and each has its own prefix.
    """
    views = [judge.seen_from(fixed) for judge in judges]
    stages = [[view.part(share) for view in views] for share in (0.125, 0.5, 1.0)]
    total = sum(judge.weight for judge in judges)

    def fitness(plans: Sequence[Sequence[Unit]], stage: int) -> Sequence[float]:
        removed = [dict.fromkeys(sublayers_of(plan)) for plan in plans]
        batches = sum(len(view.mine()) for view in stages[stage])
        with reporter.progress(f"{len(plans)} plans", len(plans) * batches) as step:
            costs = [
                judge.weight / total * view.values(removed, objective, step.advance).mean(1)
                for judge, view in zip(judges, stages[stage], strict=True)
            ]
        whole: list[float] = sum(costs[1:], costs[0]).tolist()
        named = {", ".join(map(str, plan)): cost for plan, cost in zip(plans, whole, strict=True)}
        check_numbers(named, f"{objective} without some layers")
        return whole

    return fitness


def _run(evaluator: Evaluator, among: Sequence[Unit], count: int, reporter: Reporter) -> list[Unit]:
    blocks = [unit for unit in among if unit.kind == "block"]
    if len(blocks) != len(evaluator.blocks):
        raise RecipeError("--search consecutive removes a run of whole blocks: ask for --blocks N, without --keep")
    return search.consecutive(angular_runs(evaluator, count, reporter), count)
