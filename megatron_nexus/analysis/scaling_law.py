"""The paper's scaling law, ln PPL = alpha |ln R| + beta, fitted by least squares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from scipy.special import stdtrit

from megatron_nexus.analysis.cycles import f_test, unexplained

PAPER_ALPHA = -0.0991
LEAST_POINTS = 5
DRAWS = 10_000


@dataclass(frozen=True)
class ScalingLaw:
    """Slope and intercept of `n` points with 95 % intervals (Student's t).

    p-values of the slope: `p_constant` of its t test, `p_shuffled` the share of draws with shuffled losses
    that are as steep, `p_trend` of its F test next to a linear trend in tokens: two series that both
    drift are correlated, whatever they measure.
    """

    n: int
    alpha: float
    alpha_95: tuple[float, float]
    beta: float
    beta_95: tuple[float, float]
    r_squared: float
    p_constant: float
    p_shuffled: float
    p_trend: float

    def __str__(self) -> str:
        low, high = self.alpha_95
        verdict = "a slope beyond chance and a trend"
        if max(self.p_constant, self.p_shuffled) >= 0.05:
            verdict = "no evidence of a law"
        elif self.p_trend >= 0.05:
            verdict = "no evidence of a law beyond a common trend in time"
        inside = "in" if low <= PAPER_ALPHA <= high else "outside"
        return (
            f"scaling law: {self.n} points, ln PPL = {self.alpha:+.4f} |ln R| {self.beta:+.4f} (slope 95 % "
            f"{low:+.4f} to {high:+.4f}, R^2 {self.r_squared:.2f}, p {self.p_constant:.2g}, "
            f"{self.p_shuffled:.2g} of shuffled losses, {self.p_trend:.2g} given a trend in tokens): "
            f"{verdict}; the paper's slope {PAPER_ALPHA} is {inside} the interval"
        )


def fit_scaling_law(points: Sequence[tuple[float, float, float]], seed: int) -> ScalingLaw | str:
    """Fit the law to (tokens, R, nats per token) where R > 0; or say why that cannot be done."""
    points = [point for point in points if point[1] > 0.0]
    n = len(points)
    if n < LEAST_POINTS:
        return f"scaling law: {n} points with R > 0 and a validation loss, {LEAST_POINTS} needed"
    t, r, y = np.array(points, float).T
    x = np.abs(np.log(r))
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return f"scaling law: {n} points, of which R or the loss does not vary: not identifiable"
    fit, wide = scipy.stats.linregress(x, y), float(stdtrit(n - 2, 0.975))
    deviations = x - x.mean()
    shuffled = np.random.default_rng(seed).permuted(np.tile(y, (DRAWS, 1)), axis=1)
    above = np.count_nonzero(np.abs(shuffled @ deviations) >= abs(float(y @ deviations)) * (1.0 - 1e-9))
    trend = np.column_stack([np.ones(n), (t - t.mean()) / np.ptp(t)])
    rest, less = (float(np.square(unexplained(d, y)).sum()) for d in (trend, np.column_stack([trend, x])))

    def interval(value: float, error: float) -> tuple[float, float]:
        return float(value - wide * error), float(value + wide * error)

    return ScalingLaw(
        n=n,
        alpha=float(fit.slope),
        alpha_95=interval(fit.slope, fit.stderr),
        beta=float(fit.intercept),
        beta_95=interval(fit.intercept, fit.intercept_stderr),
        r_squared=float(fit.rvalue**2),
        p_constant=float(fit.pvalue),
        p_shuffled=(1 + above) / (1 + DRAWS),
        p_trend=f_test(rest, less, 1, n - 3),
    )
