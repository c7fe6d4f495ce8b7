"""Real processes for tests: run a worker script as the ranks of a small world on this machine."""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
from pathlib import Path

from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import WarmProcess

PEERS_PATIENCE_S = 6.0
"""How long the other ranks may take to say what they know of one that has failed."""

_CASES = 200
"""How many cases, one after the other and each at a port of its own, a start of ranks has at most."""


def run_ranks(count: int, worker: Path, *arguments: str, timeout_s: float = 3 * TIMEOUT_S) -> None:
    """Run `worker` on `count` ranks with gloo; fails with its output where a rank fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WORLD_SIZE": str(count),
        "LOCAL_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(_CASES)),
    }
    with tempfile.NamedTemporaryFile() as output:
        started = []
        for rank in range(count):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(WarmProcess([str(worker), *arguments], Path.cwd(), own, Path(output.name)))
        deadline = time.monotonic() + timeout_s
        while alive := [process.sentinel for process in started if process.returncode is None]:
            multiprocessing.connection.wait(alive, max(0.0, deadline - time.monotonic()))
            if any(process.returncode for process in started):
                deadline = min(deadline, time.monotonic() + PEERS_PATIENCE_S)
            if time.monotonic() > deadline:
                for process in started:
                    process.kill()
                    process.wait()
        codes = [process.returncode for process in started]
        said = Path(output.name).read_text(errors="replace")
    assert codes == [0] * count, f"{worker.name} on {count} ranks: exit codes {codes}\n{said[-9000:]}"
