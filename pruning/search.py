"""Choose which sublayers go, given importance or an objective."""

from collections.abc import Callable, Mapping, Sequence

from pruning.plan import Sublayer, lowest


def rank(scores: Mapping[Sublayer, float], count: int, among: Sequence[Sublayer]) -> list[Sublayer]:
    """One shot: the `count` of least importance."""
    return lowest(scores, count, among)


def greedy(
    score: Callable[[Sequence[Sublayer], Sequence[Sublayer]], Mapping[Sublayer, float]],
    count: int,
    among: Sequence[Sublayer],
) -> list[Sublayer]:
    """Remove the least important sublayer, score the rest again, and so on.

    Args:
        score: (removed so far, candidates) -> importance of each candidate.
        count: How many to remove.
        among: Candidates.

    Source: SLEB, arXiv 2402.09025; BlockPruner, arXiv 2406.10594.
    """
    gone: list[Sublayer] = []
    for _ in range(count):
        rest = [sublayer for sublayer in among if sublayer not in gone]
        gone += lowest(score(gone, rest), 1, rest)
    return sorted(gone)
