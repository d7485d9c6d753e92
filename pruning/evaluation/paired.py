"""Standard errors and confidence intervals; two models that met the same items are compared item by item."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
Z95 = 1.959964  # of a standard normal, two-sided 95%


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the estimate."""
        return Interval(*(float(function(x)) for x in (self.value, self.low, self.high)))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation / sqrt(n); as lm-evaluation-harness gives it."""
    n = len(values)
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def bootstrap(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of the mean of paired differences (other - reference), one an item.

    Resampling items resamples both models' answers together, so what makes an item hard for both cancels.

    Args:
        differences: One for each question or window.
        seed: Of the resampling.
        resamples: How many.

    Source: Efron and Tibshirani 1993, chapter 13; paired, as in Koehn 2004 (W04-3250).
    """
    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 2**22 // max(1, len(values)))
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        means[first : first + rows] = values[generator.integers(0, len(values), (rows, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(share: float, n: int) -> Interval:
    """Score interval of a share of n right answers; on the wide side for the mean of n values from 0 to 1.

    Unlike a bootstrap it says something where all answers are right, or none.

    Args:
        share: 0 to 1.
        n: Number of answers, at least 1.

    Source: Wilson 1927, as in Brown, Cai and DasGupta 2001, equation 4.
    """
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))
