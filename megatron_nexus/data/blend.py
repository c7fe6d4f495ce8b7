"""Blend: samples of several corpora, each as often as its weight says.

After i samples of a blend, a corpus of the share w has given floor(w i) or ceil(w i) of them, for every i.
Which corpus the k-th sample comes from is a function of k alone, and so is how many it has given before:
nothing is built on disk, and a run resumes anywhere.

The rule: the j-th sample of a corpus may come at floor(j / w) at the earliest and must have come by
ceil((j + 1) / w); of those that may, the one that must come first is taken. Unit jobs under the earliest
deadline always meet them (Tijdeman, "The chairman assignment problem", 1980, for what can be reached;
Baruah et al., "Proportionate progress", 1996, for the windows). Shares are fractions of a common
denominator P, so the choice repeats with the period P, and one period is held in memory.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from megatron_nexus.data.samples import TokenWindows

LONGEST_PERIOD = 100_000
"""Decimal weights of up to five places that add up to 1 are exact; 0.2 s to make."""


def whole_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Return whole numbers in proportion to the weights: exact up to a sum of 100,000, else rounded.

    Rounded by largest remainder; 0 is a weight too small to be served.
    """
    scale = lcm(*(weight.denominator for weight in weights))
    total = sum(weights)
    exact = [int(weight * scale) for weight in weights]
    divisor = int(np.gcd.reduce(np.array(exact, dtype=object)))
    if sum(exact) // divisor <= LONGEST_PERIOD:
        return tuple(number // divisor for number in exact)
    wanted = [weight / total * LONGEST_PERIOD for weight in weights]
    shares = [int(number) for number in wanted]
    by_remainder = sorted(range(len(weights)), key=lambda d: shares[d] - wanted[d])
    for d in by_remainder[: LONGEST_PERIOD - sum(shares)]:
        shares[d] += 1
    return tuple(shares)


def schedule(shares: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return the corpus of each sample of one period, [sum of shares]."""
    period = sum(shares)

    def release(d: int, j: int) -> int:
        return j * period // shares[d]

    def deadline(d: int, j: int) -> int:
        return -(-(j + 1) * period // shares[d])

    may = [(deadline(d, 0), d, 0) for d in range(len(shares))]  # by deadline: corpus, its samples so far
    later: list[tuple[int, int, int]] = []  # by release
    heapq.heapify(may)
    chosen = np.empty(period, dtype=np.int32)
    for i in range(period):
        while later and later[0][0] <= i:
            _, d, j = heapq.heappop(later)
            heapq.heappush(may, (deadline(d, j), d, j))
        due, d, j = heapq.heappop(may)
        assert i < due, "an earliest deadline was missed"
        chosen[i] = d
        if j + 1 < shares[d]:
            heapq.heappush(later, (release(d, j + 1), d, j + 1))
    return chosen


class Blend:
    """Samples of several corpora by their shares; of one corpus, its own samples in their order."""

    def __init__(self, parts: Sequence[TokenWindows], shares: Sequence[int]) -> None:
        assert len(parts) == len(shares) > 0 and min(shares) > 0, shares
        self.parts = tuple(parts)
        self.shares = tuple(shares)
        self._chosen = schedule(shares)
        # Of the same corpus, earlier in the period.
        self._before = np.empty(len(self._chosen), dtype=np.int32)
        for d, share in enumerate(shares):
            self._before[self._chosen == d] = np.arange(share)

    def place(self, k: int) -> tuple[int, int]:
        """Return the corpus of sample `k`, and which of its samples that is, from 0."""
        periods, i = divmod(k, len(self._chosen))
        d = int(self._chosen[i])
        return d, periods * self.shares[d] + int(self._before[i])

    def sample(self, k: int) -> npt.NDArray[np.int64]:
        """Return tokens of sample `k`, [L + 1]."""
        d, j = self.place(k)
        return self.parts[d].sample(j)

    def positions(self, k: int) -> npt.NDArray[np.int64]:
        """Return the place of each of the first L tokens of sample `k` in its document, [L]."""
        d, j = self.place(k)
        return self.parts[d].positions(j)

    def counts(self, k: int) -> npt.NDArray[np.int64]:
        """Return the samples of each corpus among the first `k`."""
        periods, i = divmod(k, len(self._chosen))
        rest = np.bincount(self._chosen[:i], minlength=len(self.shares))
        return periods * np.array(self.shares, dtype=np.int64) + rest

    @property
    def epoch_samples(self) -> int:
        """Samples in which no corpus gives a window twice, at least."""
        period = len(self._chosen)
        return min(
            part.window_count * period // share for part, share in zip(self.parts, self.shares, strict=True)
        )
