"""Principal components of (d1, d2, d3), and how far each state lies from the reference.

Columns are standardized (deviation of n). A state z is the first two components of a point. Its subspace is
the span of (1, 0, z1) and (0, 1, z2): the paper's text does not show the vectors, this is a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.linalg import subspace_angles

from megatron_nexus.analysis import Floats

NAMES = ("d1", "d2", "d3")
LEAST_ROWS = 5
DRAWS = 2_000


@dataclass(frozen=True)
class Components:
    """Loadings of the components in the order of what they explain, of `n` rows pooled over runs.

    `first_two_95` is a bootstrap interval over rows, `p_independent` the share of draws in which columns
    that were shuffled independently of each other explain as much with their first two.
    """

    n: int
    loadings: tuple[tuple[float, ...], ...]
    explained: tuple[float, ...]
    first_two_95: tuple[float, float]
    p_independent: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def state(self, changes: Sequence[float]) -> Floats:
        """Return z, the first two components of (d1, d2, d3)."""
        standard = (np.array(changes) - self.mean) / self.deviation
        return np.asarray(np.array(self.loadings[:2]) @ standard)

    def __str__(self) -> str:
        low, high = self.first_two_95
        lines = (
            f"; {number}: {axis[0]:+.3f} {axis[1]:+.3f} {axis[2]:+.3f}, {100 * share:.2f} %"
            for number, (axis, share) in enumerate(zip(self.loadings, self.explained, strict=True), start=1)
        )
        return (
            f"principal components of ({', '.join(NAMES)}): {self.n} points, the first two explain "
            f"{100 * sum(self.explained[:2]):.2f} % (95 % {100 * low:.0f} to {100 * high:.0f}, as much in "
            f"{100 * self.p_independent:.1f} % of draws of independent columns): "
            + ("the three move together" if self.p_independent < 0.05 else "no evidence of a common movement")
            + "".join(lines)
        )


def _shares(rows: Floats) -> Floats:
    """Return what the components explain, of [..., n, 3] rows; NaN where nothing varies.

    Columns that do not vary count as zero.
    """
    centred = rows - rows.mean(-2, keepdims=True)
    scale = centred.std(-2, keepdims=True)
    standard = centred / np.where(scale > 0.0, scale, 1.0)
    squares = np.maximum(np.linalg.eigvalsh(standard.swapaxes(-1, -2) @ standard)[..., ::-1], 0.0)
    total = squares.sum(-1, keepdims=True)
    return np.asarray(squares / np.where(total > 0.0, total, np.nan))


def principal_components(rows: Sequence[Sequence[float]], seed: int) -> Components | str:
    """Return the components of rows (d1, d2, d3); or say why that cannot be done."""
    d = np.array(rows, float).reshape(-1, len(NAMES))
    n = len(d)
    if n < LEAST_ROWS:
        return f"principal components: {n} points with d1, d2 and d3 after the reference, {LEAST_ROWS} needed"
    mean, deviation = d.mean(0), d.std(0)
    constant = [name for name, value in zip(NAMES, deviation, strict=True) if value == 0.0]
    if constant:
        return f"principal components: {', '.join(constant)} does not vary over {n} points: not identifiable"
    axes = np.linalg.svd((d - mean) / deviation, full_matrices=False)[2]
    axes *= np.where(axes[:, -1:] < 0.0, -1.0, 1.0)  # better performance counts as positive
    explained = _shares(d)
    rng = np.random.default_rng(seed)
    resampled = _shares(d[rng.integers(0, n, (DRAWS, n))])[:, :2].sum(1)
    shuffled = _shares(rng.permuted(np.broadcast_to(d, (DRAWS, *d.shape)), axis=1))[:, :2].sum(1)
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return Components(
        n=n,
        loadings=tuple(tuple(map(float, axis)) for axis in axes),
        explained=tuple(map(float, explained)),
        first_two_95=(float(low), float(high)),
        p_independent=float((1 + np.count_nonzero(shuffled >= explained[:2].sum())) / (1 + DRAWS)),
        mean=tuple(map(float, mean)),
        deviation=tuple(map(float, deviation)),
    )


def grassmann(z: Floats, reference: Floats) -> float:
    """Return the root of the sum of squares of the principal angles between the subspaces of two states."""
    planes = [np.concatenate([np.eye(2), np.reshape(state, (1, 2))]) for state in (z, reference)]
    return sqrt(float(np.square(subspace_angles(*planes)).sum()))
