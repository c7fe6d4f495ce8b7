"""Real processes for tests: run a worker script as the ranks of a small world on this machine."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

PATIENCE_S = 600.0
"""How long a test waits for other processes: a busy machine fails no test, a run that hangs does."""


def allowed(quiet_s: float) -> float:
    """What `quiet_s` seconds of a machine with nothing else to do are on this one, by its load."""
    return quiet_s * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def run_ranks(count: int, worker: Path, *arguments: str, timeout_s: float = 3 * PATIENCE_S) -> None:
    """Run `worker` on `count` ranks with gloo; fails with its output where a rank fails."""
    program = (
        "import sys; from megatron_nexus import log; from megatron_nexus.parallel.local_ranks import "
        "run_local_ranks; log.configure(True); sys.exit(run_local_ranks(int(sys.argv[1]), sys.argv[2:]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", program, str(count), str(worker), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, (
        f"{worker.name} on {count} ranks:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
