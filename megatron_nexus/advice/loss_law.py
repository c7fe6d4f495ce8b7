"""The law of the loss curve of a model size, L = E + B S^-beta + G eta, fitted to its runs, with its error.

    S      the area under the learning rate, in tokens at the peak (Tissue et al., 2408.11029)
    eta    the learning rate as a share of its peak: what a decay gains is G (1 - eta)

For a given beta the law is linear, so beta is searched on a grid (variable projection) and the rest solved
exactly, G with a prior from recorded runs: a curve without a decay says nothing about it. Errors: residuals
are resampled in blocks (neighbours on a curve err together) and everything is fitted again; then the law
errs by a share of the fall that it extrapolates, as on recorded runs (`benchmarks/advice.py`), because no
curve follows a power law exactly, and by as much where a decay would come earlier than the one that was
seen, for G is not one number. Seeds differ by a Student's t: bursts of gradients set some runs back. Sizes
share nothing: with a common beta, forecasts of recorded runs were worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from megatron_nexus.advice.curve import FIRST_SHARE, Array, Curve, Point, columns

BETAS = np.linspace(0.05, 0.65, 25)
"""Published laws have exponents of 0.28 (Chinchilla) to 0.6; within one run they are often smaller. Held to
0.25 and more, forecasts were too high and their intervals too narrow (docs/advice.md)."""
DRAWS = 1000
BLOCK = 4
"""Neighbouring points that are resampled together."""
LEAST_POINTS = 6
DECAY_GAIN = (0.16, 0.05)
"""G in nats, mean and deviation over recorded runs."""
LAW_ERROR = 0.15
"""Deviation of the law's error, as a share of the fall that it predicts beyond the last point."""
COMMON = 0.5
"""Share of that error's variance common to all sizes: curves of one kind bend alike."""
SEED_ERROR, SEED_FREEDOM = 0.012, 3
"""Scale in nats and freedom of Student's t between seeds: its deviation is 0.02, half lie within 0.01."""


@dataclass(frozen=True)
class LossLaw:
    """Draws [DRAWS] of the law of one size, with the errors of each draw; `seen` is the farthest point."""

    e: Array
    b: Array
    beta: Array
    gain: Array
    law_error: Array
    seed_error: Array
    seen: Point

    def loss(self, area: float | Array, rate: float) -> Array:
        """Return draws of the loss at an area and a rate."""
        stable = self._stable(area)
        away = self._stable(self.seen.area) - stable
        # Beyond what was seen the fall is in doubt; before it a decay, for losses at the peak were seen.
        in_doubt = np.where(away > 0.0, away, (1.0 - rate) * away)
        return stable + self.gain * rate + self.law_error * in_doubt + self.seed_error

    def area(self, loss: Array, rate: float) -> Array:
        """Return draws of the area at which `loss` is reached, infinite where it never is."""
        stable, seen = loss - self.gain * rate - self.seed_error, self._stable(self.seen.area)
        error = self.law_error * np.where(stable < seen, 1.0, 1.0 - rate)
        reducible = np.maximum((stable - error * seen) / (1.0 - error) - self.e, 0.0)
        with np.errstate(divide="ignore"):
            return np.asarray((reducible / self.b) ** (-1.0 / self.beta), float)

    def _stable(self, area: float | Array) -> Array:
        return np.asarray(self.e + self.b * np.asarray(area, float) ** -self.beta, float)


def fit_law(curves: Sequence[Curve], seed: int, number: int, betas: Array = BETAS) -> LossLaw:
    """Fit the law to the curves of one size, each of at least `LEAST_POINTS` fitted points.

    Sizes of one `seed` have a part of their draws in common; `number` tells them apart.
    """
    rng = np.random.default_rng([seed, number])
    farthest = max(curve.last.tokens for curve in curves)
    parts = [columns(points) for curve in curves if (points := curve.after(FIRST_SHARE * farthest))]
    areas, rates, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    freedom = max(1, len(y) - 4)
    # A first fit without G tells the residuals' deviation, against which the row of G is weighed.
    bare = [np.column_stack([np.ones_like(y), areas**-beta]) for beta in betas]
    least = min(float(np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).sum()) for x in bare)
    weight = np.sqrt(max(least, 1e-12) / freedom) / DECAY_GAIN[1]
    row = np.array([[0.0, 0.0, weight]])
    designs = [np.concatenate([np.column_stack([x, rates]), row]) for x in bare]
    solvers = [np.linalg.pinv(x) for x in designs]

    def solve(rows: Array) -> tuple[Array, Array]:
        """Return which beta [N] and E, B, G [N, 3] of N rows of losses."""
        found = np.stack([rows @ s.T for s in solvers])
        errors = [np.square(rows - f @ x.T).sum(1) for x, f in zip(designs, found, strict=True)]
        negative = (found[:, :, :2] < 0).any(2)  # no loss falls below 0, and none rises for ever
        best = (np.stack(errors) + 1e6 * negative).argmin(0)
        return best, found[best, np.arange(len(rows))]

    best, unknown = solve(np.append(y, weight * DECAY_GAIN[0])[None])
    fitted = (designs[int(best[0])] @ unknown[0])[:-1]
    residuals = (y - fitted) * np.sqrt(len(y) / freedom)
    each = np.split(residuals, np.cumsum([len(losses) for *_, losses in parts])[:-1])
    rows = fitted + np.concatenate([_blocks(part, rng) for part in each], axis=1)
    gains = weight * np.random.default_rng(seed).normal(*DECAY_GAIN, (DRAWS, 1))
    best, unknown = solve(np.concatenate([rows, gains], axis=1))
    law_error, seed_error = _errors(seed, number)
    return LossLaw(
        e=unknown[:, 0],
        b=np.maximum(unknown[:, 1], 1e-9),
        beta=np.asarray(betas)[best],
        gain=np.maximum(unknown[:, 2], 0.0),
        law_error=law_error,
        seed_error=seed_error,
        seen=max((point for curve in curves for point in curve.points), key=lambda point: point.area),
    )


def _errors(seed: int, number: int) -> Array:
    """Return draws of the law's error, cut off before a fall would turn, and of the seed's."""
    common = np.random.default_rng([seed, 2**32 - 1]).standard_normal(DRAWS)
    rng = np.random.default_rng([seed, number, 1])
    own, seed_error = rng.standard_normal(DRAWS), rng.standard_t(SEED_FREEDOM, DRAWS)
    law_error = LAW_ERROR * (np.sqrt(COMMON) * common + np.sqrt(1.0 - COMMON) * own)
    return np.stack([np.clip(law_error, -0.9, 0.9), SEED_ERROR * seed_error])


def _blocks(residuals: Array, rng: np.random.Generator) -> Array:
    """Return DRAWS resamples of a curve's residuals, in circular blocks."""
    n = len(residuals)
    starts = rng.integers(0, n, (DRAWS, ceil(n / BLOCK)))
    index = (starts[:, :, None] + np.arange(BLOCK)) % n
    return np.asarray(residuals[index.reshape(DRAWS, -1)[:, :n]], float)


def law_of_size(laws: Mapping[str, LossLaw], sizes: Mapping[str, int], parameters: int, seed: int) -> LossLaw:
    """Return the law of a size that no run had, from laws of one beta: E and ln B linear in ln N.

    Each draw errs as its line misses the sizes that are known, with what extrapolation adds.
    """
    rng, names = np.random.default_rng(seed), list(laws)
    x = np.log([sizes[name] for name in names])
    at, n = np.log(parameters), len(names)
    design = np.column_stack([np.ones(n), x - x.mean()])
    spread = np.sqrt(1.0 + 1.0 / n + (at - x.mean()) ** 2 / np.square(x - x.mean()).sum())

    def extrapolate(values: Array) -> Array:
        """Return [DRAWS] of values [DRAWS, sizes]."""
        found = values @ np.linalg.pinv(design).T
        misses = values - found @ design.T
        deviation = np.sqrt(np.square(misses).sum(1) / max(1, n - 2))
        drawn = rng.standard_t(max(1, n - 2), DRAWS)
        return np.asarray(found @ np.array([1.0, at - x.mean()]) + drawn * deviation * spread, float)

    first = laws[names[0]]
    law_error, seed_error = _errors(seed, parameters)
    return LossLaw(
        e=extrapolate(np.stack([law.e for law in laws.values()], axis=1)),
        b=np.exp(extrapolate(np.log(np.stack([law.b for law in laws.values()], axis=1)))),
        beta=first.beta,
        gain=np.mean([law.gain for law in laws.values()], axis=0),
        law_error=law_error,
        seed_error=seed_error,
        seen=min((law.seen for law in laws.values()), key=lambda point: point.area),
    )
