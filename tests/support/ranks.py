"""Real processes for tests: run a worker script as the ranks of a small world on this machine."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from megatron_nexus.parallel.local_ranks import die_with_parent
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_S

PEERS_PATIENCE_S = 6.0
"""How long the other ranks may take to say what they know of one that has failed."""

RANKS = multiprocessing.get_context("forkserver")
"""Forks the ranks from one process that has imported torch and DeepSpeed: seconds of each rank's start."""
RANKS.set_forkserver_preload(["tests.support.rank_preload"])

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
            told = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [str(worker), *arguments]
            started.append(RANKS.Process(target=_be_rank, args=(told, output.name, words)))
            with mock.patch.dict(os.environ, environment):  # the server's, where this starts it
                started[-1].start()
        deadline = time.monotonic() + timeout_s
        while alive := [process.sentinel for process in started if process.exitcode is None]:
            multiprocessing.connection.wait(alive, max(0.0, deadline - time.monotonic()))
            if any(process.exitcode for process in started):
                deadline = min(deadline, time.monotonic() + PEERS_PATIENCE_S)
            if time.monotonic() > deadline:
                for process in started:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in started]
        said = Path(output.name).read_text(errors="replace")
    assert codes == [0] * count, f"{worker.name} on {count} ranks: exit codes {codes}\n{said[-9000:]}"


def _be_rank(environment: Mapping[str, str], output: str, words: list[str]) -> None:
    """What a forked process does: `python WORDS` in `environment`, all it says appended to `output`."""
    die_with_parent()
    with Path(output).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
