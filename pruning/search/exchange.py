"""Plans of full KV heads, tried as they are and improved by exchange."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pruning.console import Reporter
from pruning.finite import check_numbers
from pruning.plan import Sublayer
from pruning.search import heads
from pruning.search.selection import Judge
from pruning.variants.window import Window

SHORTLIST = 6  # heads outside of a plan that exchange tries at a time, and heads inside that it tries to do without
ROUNDS = 4  # exchanges, at most


@dataclass
class Trial:
    """Plans measured by their judges; each once.

    Attributes:
        judges: Texts.
        limits: Every layer that may be limited, limited.
        reporter: For progress.
    """

    judges: Sequence[Judge]
    limits: Mapping[Sublayer, Window]
    reporter: Reporter
    _known: dict[heads.Full, float] = field(default_factory=dict)
    _modules: dict[tuple[Sublayer, tuple[int, ...]], Window] = field(default_factory=dict)
    _ends: list[Tensor] = field(default_factory=list)

    def costs(self, plans: Iterable[heads.Full], what: str) -> list[float]:
        """Increase of the judges' losses, as `weigh` makes one cost of them, nats/token of the first judge."""
        plans = list(plans)
        missing = [plan for plan in dict.fromkeys(plans) if plan not in self._known]
        if missing:
            asked = [self._gone(plan) for plan in missing]
            batches = sum(len(judge.evaluator.mine()) for judge in self.judges)
            with self.reporter.progress(what, (len(missing) + 2 * (not self._ends)) * batches) as step:
                if not self._ends:
                    ends = [{}, heads.limited(self.limits, frozenset())]
                    self._ends = [judge.evaluator.values(ends, advance=step.advance).mean(1) for judge in self.judges]
                costs = [
                    judge.evaluator.values(asked, advance=step.advance).mean(1) - dense
                    for judge, (dense, _) in zip(self.judges, self._ends, strict=True)
                ]
            found = heads.weigh(self.judges, costs, [float(limited - dense) for dense, limited in self._ends]).tolist()
            check_numbers({str(number): cost for number, cost in enumerate(found)}, what)
            self._known |= dict(zip(missing, found, strict=True))
        return [self._known[plan] for plan in plans]

    def _gone(self, plan: heads.Full) -> dict[Sublayer, Window]:
        """The plan's limits; equal ones are the same modules, so that plans share what they have in common."""
        made = heads.limited(self.limits, plan)
        return {each: self._modules.setdefault((each, window.full), window) for each, window in made.items()}


def exchange(trial: Trial, start: heads.Full, scores: heads.HeadScores, free: Collection[heads.Head]) -> heads.Full:
    """Swap single heads while that makes the plan cheaper.

    Each round adds each of the best heads outside and leaves out each of the least heads inside, measures these plans,
    and then tries the best additions with the best omissions.

    Source: the exchange algorithm for subsets, Fedorov 1972. Inferred: the shortlists, by first-order scores.
    """
    plan = start
    for number in range(1, ROUNDS + 1):
        ranked = heads.ranked(scores, free)
        outside = [head for head in ranked if head not in plan][:SHORTLIST]
        inside = [head for head in reversed(ranked) if head in plan][:SHORTLIST]
        added = [plan | {head} for head in outside]
        less = [plan - {head} for head in inside]
        before, *costs = trial.costs([plan, *added, *less], f"exchange, round {number}")
        gains = sorted(zip(costs[: len(added)], outside, strict=True))[:3]
        losses = sorted(zip(costs[len(added) :], inside, strict=True))[:3]
        swapped = [plan - {old} | {new} for _, new in gains for _, old in losses]
        after, best = min(zip(trial.costs(swapped, f"exchange, round {number}"), swapped, strict=True),
                          key=lambda each: each[0])  # fmt: skip
        if after >= before:
            break
        trial.reporter.say(f"exchange: {before:.4f} -> {after:.4f} nats/token")
        plan = best
    return plan
