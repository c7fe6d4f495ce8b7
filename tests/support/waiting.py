"""How long tests wait for other processes."""

import os
import time
from collections.abc import Callable

TIMEOUT_S = 600.0
"""How long a test waits for other processes: a busy machine fails no test, a run that hangs does."""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds; fail with `what` where it does not within TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:.0f} s: {what}"
        time.sleep(0.02)


def scaled_by_load(quiet_s: float) -> float:
    """Return what takes `quiet_s` seconds on an idle machine, scaled by the load of this one."""
    return quiet_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
