"""Worker processes end with the block and with their parent, whatever they do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_nexus.base.workers import worker_pool

PARENT = """
import multiprocessing, signal, sys, time
from megatron_nexus.base.workers import worker_pool
with worker_pool(2, sys.argv[1]) as pool:
    for _ in range(2):
        pool.submit(time.sleep, 60)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    signal.pause()
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_parent_that_is_killed(method: str) -> None:
    command = [sys.executable, "-c", PARENT, method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 2 and all(map(is_running, pids))
        finally:
            parent.kill()
    until = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_the_end_of_the_block_ends_workers_that_are_busy() -> None:
    began = time.monotonic()
    with worker_pool(1, "fork") as pool:
        assert pool.submit(abs, -3).result() == 3
        pid = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 60)
    assert not is_running(pid)
    assert time.monotonic() - began < 30
