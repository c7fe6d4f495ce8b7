"""Step watch: says that a step hangs before NCCL's watchdog ends the process, which Python has no part in."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_nexus.log import logger

_SHARE = 0.95
"""Of the time-out, after which it speaks: the watchdog counts from a collective, which begins later."""


class StepWatch:
    """Warns once, on one rank, of a step that takes nearly as long as a collective may."""

    def __init__(self, timeout_s: float, is_first: Callable[[], bool]) -> None:
        """`is_first` returns whether this rank is the first to ask; `timeout_s` of 0 watches nothing."""
        self.timeout_s = timeout_s
        self._is_first = is_first

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watch the step that the block takes."""
        if not self.timeout_s:
            yield
            return
        timer = threading.Timer(_SHARE * self.timeout_s, self._tell, (number,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _tell(self, number: int) -> None:
        if self._is_first():
            logger.warning(
                "step %d has taken %.0f s: a rank hangs, or is slow; NCCL ends the run where a collective "
                "takes %.0f s, and writes nccl_trace_rank_* into its folder: look at those, or raise "
                "--distributed-timeout-seconds-after-init (in the first step --distributed-timeout-minutes)",
                number,
                _SHARE * self.timeout_s,
                self.timeout_s,
            )
