"""Gate: a training process that runs only when asked, a few steps at a time, and tells how long they took."""

import os
import time
from multiprocessing.connection import Connection

WARM_UP_STEPS = 1


class Gate:
    """Every contestant calls `passed` after each of its steps, wherever its own loop lets it.

    The first step warms up. Then `passed` blocks until the parent sends a number of steps, and at the end
    of the last of them answers with their seconds, by the wall and of the processor, all threads together:
    what happens between two calls is all inside the clocks.
    """

    def __init__(self, connection: Connection, facts: dict[str, float]) -> None:
        """`facts` are sent to the parent once the contestant is warm, with the seconds from now to then."""
        self._connection = connection
        self._facts = facts
        self._left = WARM_UP_STEPS
        self._warm = False
        self._began = _clocks()

    def passed(self) -> None:
        """Count a step; at the last one report and wait for the next order."""
        self._left -= 1
        if self._left > 0:
            return
        seconds = [now - began for now, began in zip(_clocks(), self._began, strict=True)]
        self._connection.send(seconds if self._warm else {**self._facts, "warm_up_s": seconds[0]})
        self._warm = True
        try:
            self._left = int(self._connection.recv())
        except EOFError:
            # Nobody asks any more. Frameworks would save, summarise and join threads: leave at once.
            os._exit(0)
        self._began = _clocks()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
