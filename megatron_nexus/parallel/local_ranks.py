"""Local ranks: where no launcher starts enough processes on a machine of CPUs, this one starts them.

It watches them, passes signals on, and when one fails ends the others, so that nothing is left behind.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_nexus.config.exit_signals import DEFAULT_EXIT_SIGNALS, handle, parse_exit_signals
from megatron_nexus.log import logger
from megatron_nexus.parallel.devices import device_files
from megatron_nexus.parallel.launcher_watch import ancestors, is_nexus_launch
from megatron_nexus.parallel.world import LAUNCHER, LISTENER, World

GRACE_PERIOD_S = 6.0
_PR_SET_PDEATHSIG = 1


def missing_ranks(world: World, wanted: int) -> bool:
    """Return whether this process should start `wanted` local ranks itself.

    True on a machine without accelerators where a shell started one process, or where the `deepspeed`
    launcher did because no flag said how many to start. Every other launcher's count is taken as meant.
    """
    if world.size != 1 or wanted == 1 or device_files():
        return False
    return world.launcher == "none" or (world.launcher == "deepspeed" and not _deepspeed_was_told())


def _deepspeed_was_told() -> bool:
    """Return whether the `deepspeed` or `nexus launch` command above this process names hosts or devices."""
    count_flags = ("--num_gpus", "--num_nodes", "--num_accelerators", "--include", "--exclude", "--hostfile")
    short = ("-i", "-e", "-H")
    for process in ancestors():
        words = list(process.words)
        if is_nexus_launch(words) or any(Path(word).name == "deepspeed" for word in words[:2]):
            flags = [word.split("=")[0] for word in words[: words.index(_script(words))]]
            return any(flag in count_flags or flag in short for flag in flags)
    return False


def _script(words: list[str]) -> str:
    """Return the first word after the launcher's own flags: a Python file, the verb `train`, or the last."""
    return next((word for word in words[2:] if word.endswith(".py") or word == "train"), words[-1])


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process the signal `number` when its parent is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def run_local_ranks(
    count: int,
    command: list[str],
    exit_signals: Sequence[signal.Signals] = parse_exit_signals(DEFAULT_EXIT_SIGNALS),
) -> int:
    """Run `command` as ranks 0 ... count - 1 on this machine and return the exit code of the run.

    `exit_signals` are passed on, and the ranks get the first of them when this process is gone. When a rank
    fails, the others get 6 s to leave by themselves, then they are ended. The exit code is that of the rank
    that failed first.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    # Listens from now on, until rank 0 serves it: nothing else on this machine can take the port between.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_SIZE": str(count),
            LAUNCHER: "local",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            LISTENER: str(listener.fileno()),
        }
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-u", *command],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                pass_fds=[listener.fileno()] if rank == 0 else [],
                preexec_fn=partial(die_with_parent, exit_signals[0]),
            )
            for rank in range(count)
        ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    handle(exit_signals, pass_on)
    try:
        return _watch(ranks, exit_signals)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _cause(ended_by: signal.Signals, exit_signals: Sequence[signal.Signals]) -> str:
    if ended_by in exit_signals:
        return "the run had not begun to train, or was stopped twice: nothing more was saved"
    if ended_by is signal.SIGBUS:
        return "a data file was cut short while it was read, or /dev/shm is full?"
    return "out of memory, or killed manually?" if ended_by is signal.SIGKILL else "a crash outside Python"


def _watch(ranks: list[subprocess.Popen[bytes]], exit_signals: Sequence[signal.Signals]) -> int:
    """Wait for all ranks, or for the first failure and then a little longer; return the exit code."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        bad = [(rank, code) for rank, code in enumerate(codes) if code]
        if not failed and bad:
            # Of those that ended since the last look, one that was killed: the others left because of it.
            rank, failed = min(bad, key=lambda found: (found[1] > 0, found[0]))
            deadline = time.monotonic() + GRACE_PERIOD_S
            if failed < 0:
                ended_by = signal.Signals(-failed)
                logger.error(
                    "rank %d was terminated by %s: %s", rank, ended_by.name, _cause(ended_by, exit_signals)
                )
        if None not in codes or time.monotonic() > deadline:
            return 128 - failed if failed < 0 else failed
        time.sleep(0.05)
