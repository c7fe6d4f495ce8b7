"""The mean of a few seeds, with its interval by Student's t distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds, half the width of its 95 % interval, and the p value of the mean being 0.

    Of one seed there is neither: both are NaN.
    """

    mean: float
    half: float
    p: float
    n: int

    @property
    def error(self) -> float:
        """The standard error."""
        return self.half / float(stdtrit(self.n - 1, 0.5 + CONFIDENCE / 2)) if self.n > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (" (one seed)" if self.n < 2 else f" +- {self.half:.4f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the seeds' values, with its interval where there are two or more."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    if error == 0.0:
        return Estimate(mean, 0.0, 1.0 if mean == 0.0 else 0.0, n)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * error
    return Estimate(mean, half, float(2 * stdtr(n - 1, -abs(mean) / error)), n)
