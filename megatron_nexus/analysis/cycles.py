"""Whether a series oscillates: harmonic regression, and Fisher's g, against white noise and a random walk.

    R(t) = c + d t + a cos(2 pi t / P) + b sin(2 pi t / P)          P = n / k points, k = 1 ... (n - 1) // 2
    g = max_k P(f_k) / sum_k P(f_k)                                 of the linearly detrended series

The period is the best of several, so the F test as if it had been known is too small: in the null models the
period is chosen as well. Weights move little between checkpoints, so that R is smooth: a random walk, which
has no period either, is the null model that matters then. Fisher's exact p is that of white noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb, sqrt

import numpy as np
from scipy.special import fdtrc, fdtri

from megatron_nexus.analysis import Floats

LEAST_POINTS = 6
"""Four coefficients, and two degrees of freedom of their error."""
DRAWS = 10_000
UNEVEN = 0.01
"""The largest deviation of a step in time from the mean one, for a periodogram."""
FLAT = 1e-20


@dataclass(frozen=True)
class NullShares:
    """The shares of draws of two null models that do as well: p-values."""

    white_noise: float
    random_walk: float

    def verdict(self, cycles: int) -> str:
        """Return them in words, of a peak at `cycles` periods over the whole series."""
        words = "a cycle beyond white noise and a random walk"
        if self.white_noise >= 0.05:
            words = "no evidence of a cycle"
        elif self.random_walk >= 0.05:
            words = "no evidence of a cycle beyond a random walk"
        elif cycles == 1:
            words = "a bend, not identifiable as a cycle: its period is the length of the series"
        return f"{self.white_noise:.2g} of white noise, {self.random_walk:.2g} of random walks: {words}"


@dataclass(frozen=True)
class Cycle:
    """The best harmonic of `n` points out of `periods`: `cycles` of `period`, in the unit of the times.

    `amplitude_95` bounds the amplitude (joint 95 % region of a and b). `p_known_period` is the F test of the
    harmonic given the trend, `p_constant` of trend and harmonic against a constant, as if the period had not
    been chosen. `p_chosen` is of the first F with the best period of each draw, `p_explained` of R^2.
    """

    n: int
    periods: int
    cycles: int
    period: float
    amplitude: float
    amplitude_95: tuple[float, float]
    r_squared: float
    p_known_period: float
    p_constant: float
    p_chosen: NullShares
    p_explained: NullShares

    def __str__(self) -> str:
        low, high = self.amplitude_95
        return (
            f"harmonic: {self.n} points, best of {self.periods} periods {self.period:.3g} tokens, amplitude "
            f"{self.amplitude:.3g} (95 % {low:.3g} to {high:.3g}); trend and harmonic explain "
            f"{self.r_squared:.2f} (p {self.p_constant:.2g}; as much in "
            f"{100 * self.p_explained.white_noise:.2g} % of draws of white noise); given the trend p "
            f"{self.p_known_period:.2g} as if the period were known, as the best of {self.periods} "
            f"{self.p_chosen.verdict(self.cycles)}"
        )


@dataclass(frozen=True)
class FisherG:
    """Fisher's g of a detrended series, its peak, its exact p-value, and those of detrended draws."""

    n: int
    cycles: int
    g: float
    p_exact: float
    p_detrended: NullShares

    def __str__(self) -> str:
        return (
            f"Fisher's g: {self.n} points, g {self.g:.3f} at {self.cycles} cycles, exact p "
            f"{self.p_exact:.2g}, {self.p_detrended.verdict(self.cycles)}"
        )


def unexplained(design: Floats, series: Floats) -> Floats:
    """Return what is left of each column of `series` after regression on the columns of `design`."""
    basis = np.linalg.qr(design)[0]
    return np.asarray(series - basis @ (basis.T @ series))


def f_test(smaller: float, larger: float, added: int, left: int) -> float:
    """Return the p-value of `added` more columns, by the residual sums of squares of both models."""
    return float(fdtrc(added, left, max(0.0, float(_f(np.array(smaller), np.array(larger), added, left)))))


def _f(smaller: Floats, larger: Floats, added: int, left: int) -> Floats:
    return (smaller - larger) / added / (np.maximum(larger, 1e-12 * smaller + 1e-300) / left)


def _squares(design: Floats, series: Floats) -> Floats:
    return np.asarray(np.square(unexplained(design, series)).sum(0))


def _designs(times: Floats) -> tuple[Floats, Floats, list[Floats]]:
    """Return the designs of a constant, of a trend, and of a trend with each harmonic."""
    n = len(times)
    place = (times - times[0]) / (times[-1] - times[0]) * (n - 1)
    trend = np.stack([np.ones(n), place - place.mean()], 1)
    angles = [2.0 * np.pi * k * place / n for k in range(1, (n - 1) // 2 + 1)]
    return trend[:, :1], trend, [np.column_stack([trend, np.cos(a), np.sin(a)]) for a in angles]


class _Null:
    """The best F, the best share explained and Fisher's g of draws of both null models at `times`."""

    def __init__(self, times: tuple[float, ...], seed: int) -> None:
        noise = np.random.default_rng(seed).standard_normal((len(times), DRAWS))
        constant, trend, waves = _designs(np.array(times))
        self.f, self.share, self.g = [], [], []
        for draws in (noise, noise.cumsum(0)):
            best = np.min([_squares(wave, draws) for wave in waves], axis=0)
            self.f.append(_f(_squares(trend, draws), best, 2, len(times) - 4))
            self.share.append(1.0 - best / _squares(constant, draws))
            self.g.append(peak_share(unexplained(trend, draws)))


_null = cache(_Null)


def _shares(null: list[Floats], found: float) -> NullShares:
    """Return the p-values of what was found in the draws of the null models."""
    least = found * (1.0 - 1e-9)
    return NullShares(*(float((1 + np.count_nonzero(draws >= least)) / (1 + DRAWS)) for draws in null))


def fit_cycle(times: Sequence[float], series: Sequence[float], seed: int) -> Cycle | str:
    """Fit the best harmonic; or say why that cannot be done."""
    n, t, y = len(series), np.array(times, float), np.array(series, float)
    if n < LEAST_POINTS:
        return f"harmonic: {n} points, and it needs {LEAST_POINTS}: not identifiable"
    constant, trend, waves = _designs(t)
    flat, straight = float(_squares(constant, y)), float(_squares(trend, y))
    if straight <= FLAT * float(np.square(y).sum()):
        return f"harmonic: {n} points that lie on a line: not identifiable"
    rests = [float(_squares(wave, y)) for wave in waves]
    k = int(np.argmin(rests))
    rest, left = rests[k], n - 4
    covariance = np.linalg.inv(waves[k].T @ waves[k])[2:, 2:] * rest / left
    amplitude = float(np.hypot(*np.linalg.lstsq(waves[k], y, rcond=None)[0][2:]))
    radius = sqrt(2.0 * fdtri(2, left, 0.95) * float(np.linalg.eigvalsh(covariance)[-1]))
    null = _null(tuple(times), seed)
    return Cycle(
        n=n,
        periods=len(waves),
        cycles=k + 1,
        period=float(t[-1] - t[0]) / (n - 1) * n / (k + 1),
        amplitude=amplitude,
        amplitude_95=(max(0.0, amplitude - radius), amplitude + radius),
        r_squared=1.0 - rest / flat,
        p_known_period=f_test(straight, rest, 2, left),
        p_constant=f_test(flat, rest, 3, left),
        p_chosen=_shares(null.f, float(_f(np.array(straight), np.array(rest), 2, left))),
        p_explained=_shares(null.share, 1.0 - rest / flat),
    )


def _periodogram(series: Floats) -> Floats:
    """Return the power of 1 to (n - 1) // 2 cycles, by column: no mean, no alternating signs."""
    return np.square(np.abs(np.fft.rfft(series, axis=0)[1 : (len(series) - 1) // 2 + 1]))


def peak_share(series: Floats) -> Floats:
    """Return Fisher's g of each column."""
    power = _periodogram(series)
    return np.asarray(power.max(0) / power.sum(0))


def fisher_p(g: float, ordinates: int) -> float:
    """Return the chance that g of white noise is at least this large (Fisher, 1929), exactly.

    The sum alternates, with terms far above one: rational arithmetic.
    """
    share = Fraction(g)
    terms = (
        (-1) ** (j - 1) * comb(ordinates, j) * (1 - j * share) ** (ordinates - 1)
        for j in range(1, ordinates + 1)
        if j * share < 1
    )
    return float(min(Fraction(1), max(Fraction(0), sum(terms, Fraction(0)))))


def fisher_g(times: Sequence[float], series: Sequence[float], seed: int) -> FisherG | str:
    """Return Fisher's g of a series after its linear trend; or say why that cannot be done."""
    n, t, y = len(series), np.array(times, float), np.array(series, float)
    if n < LEAST_POINTS:
        return f"Fisher's g: {n} points, and it needs {LEAST_POINTS}: cannot be computed"
    if np.abs(np.diff(t) / np.diff(t).mean() - 1.0).max() > UNEVEN:
        return f"Fisher's g: {n} points that are not evenly spaced in tokens: cannot be computed"
    rest = unexplained(_designs(t)[1], y)
    if np.square(rest).sum() <= FLAT * np.square(y).sum():
        return f"Fisher's g: {n} points that lie on a line: cannot be computed"
    g = float(peak_share(rest))
    cycles = int(np.argmax(_periodogram(rest))) + 1
    return FisherG(n, cycles, g, fisher_p(g, (n - 1) // 2), _shares(_null(tuple(times), seed).g, g))
