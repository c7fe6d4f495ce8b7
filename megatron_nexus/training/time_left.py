"""Time left: how long a run will take to its last token, from its recent steps."""

import time
from collections import deque
from statistics import median

from megatron_nexus.training.metrics import StepMetrics

RECENT_STEPS, FEWEST_STEPS = 64, 3


class TimeLeft:
    """Predicts from the median time a token of recent steps, and from what is between steps.

    A median step is not moved by one that waited for a disk. The time between steps (evaluations, saves) is
    taken to stay the share that it has been since the first step, which is left out: it compiles.
    """

    def __init__(self, last_tokens: int) -> None:
        """`last_tokens` is what the run will have read at its end."""
        self._last_tokens = last_tokens
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._steps_s = 0.0
        self._began: float | None = None

    def seconds(self, metrics: StepMetrics) -> float | None:
        """Count a step, and return the seconds that are left after it; None while too few are known."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return None
        self._recent.append(1.0 / metrics.tokens_per_s)
        self._steps_s += metrics.step_s
        if len(self._recent) < FEWEST_STEPS:
            return None
        overhead = max(1.0, (now - self._began) / self._steps_s) if self._steps_s else 1.0
        return median(self._recent) * max(0, self._last_tokens - metrics.tokens) * overhead
