"""Spikes: steps whose loss or gradient norm lies far above that of the steps before.

The score is that of OLMo-core's SkipStepOptimizer (src/olmo_core/optim/skip_step_optimizer.py): how many
standard deviations a value lies above the mean of the last finite ones, of the loss and of the gradient norm;
by its defaults of 128 steps, from half as many on, and a spike lies more than 6 above.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from megatron_nexus.base.json_text import parse_record


class SpikeDetector:
    """Knows the recent losses and gradient norms of a run, alike on every rank."""

    def __init__(self, length: int, sigmas: float) -> None:
        """Remember `length` steps; a spike lies more than `sigmas` standard deviations above their mean."""
        self.length, self._sigmas = length, sigmas
        self._losses: deque[float] = deque(maxlen=length)
        self._norms: deque[float] = deque(maxlen=length)

    def add(self, loss: float, norm: float) -> None:
        """Remember a step."""
        self._losses.append(loss)
        self._norms.append(norm)

    def set(self, steps: Iterable[tuple[float, float]]) -> None:
        """Remember these losses and gradient norms alone, the oldest first."""
        self._losses.clear()
        self._norms.clear()
        for loss, norm in steps:
            self.add(loss, norm)

    def restore(self, text: str) -> None:
        """Remember the steps of a JSON text alone; an update that was left out may have an infinite norm."""
        self.set(parse_record(text))

    def score(self, loss: float | None, norm: float) -> float:
        """Return by how many standard deviations a step lies too high; infinity where it is not finite.

        0 while too few steps are known. A loss of None is not looked at.
        """
        of_norm = self._of(norm, self._norms)
        return of_norm if loss is None else max(of_norm, self._of(loss, self._losses))

    def admits(self, loss: float | None, norm: float) -> bool:
        """Return whether a step is no spike."""
        return self.score(loss, norm) <= self._sigmas

    def _of(self, value: float, before: deque[float]) -> float:
        if not math.isfinite(value):
            return math.inf
        finite = [one for one in before if math.isfinite(one)]
        if len(before) + 1 < max(2, self.length // 2) or len(finite) < 2:
            return 0.0
        above, deviation = value - statistics.fmean(finite), statistics.stdev(finite)
        if above <= 0.0:
            return 0.0
        return above / deviation if deviation else math.inf
