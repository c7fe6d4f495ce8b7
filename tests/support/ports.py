"""TCP ports for the processes that tests start."""

import os
import random
import socket

_FIRST = int(os.environ.get("NEXUS_TEST_FIRST_PORT", "12000"))
_PORTS = range(_FIRST, _FIRST + 8_000)
"""Below those that a job's ranks meet at (`world.PORTS`) and those that Linux hands out."""
_next_port = random.SystemRandom().randrange(len(_PORTS))


def free_port(count: int = 1) -> int:
    """Return a TCP port that nobody listens on, the first of `count` in a row.

    Each worker of pytest-xdist takes turns in a range of its own, so that two tests never get the same port.
    """
    global _next_port
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = len(_PORTS) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        _next_port = (_next_port + count) % (share - count)
        ports = _PORTS[worker * share + _next_port :][:count]
        if all(map(_is_free, ports)):
            return ports[0]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
