"""Launcher watch: a rank whose launcher is gone stops, as if it had been asked to by a signal.

    deepspeed (runner) -> python -m deepspeed.launcher.launch -> rank

`kill <pid of deepspeed>` ends only the first of these, whatever the signal: it passes none on. The others
would train on, and nothing that the user knows of could stop them.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_nexus.base.invocation import COMMAND, PACKAGE
from megatron_nexus.log import logger

INTERVAL_S = 0.5
PROGRAMS = frozenset(
    (
        *("deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
        *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"),
        *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orterun", "orted", "prterun", "prted"),
        *("srun", "slurmstepd:"),
    )
)
"""First words of launchers, their scripts or modules."""

LAUNCH = "launch"
"""The verb of `nexus` that runs DeepSpeed's runner in its own process."""


@dataclass(frozen=True)
class Process:
    """A process of this machine; its start, in clock ticks, sets it apart from a later one of this number."""

    pid: int
    start_ticks: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """The launcher that it is; "" if it is none: `python -u -m MODULE` and `python SCRIPT` count too."""
        if is_nexus_launch(self.words):
            return f"{COMMAND} {LAUNCH}"
        return next((name for word in self.words[:4] if (name := Path(word).name) in PROGRAMS), "")

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended. A zombie, which waits for its parent to look at it, has."""
        found = process_stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[2] == self.start_ticks


def is_nexus_launch(words: Sequence[str]) -> bool:
    """Return whether a command line is `nexus launch` or `python -m megatron_nexus launch`."""
    return any(
        word == LAUNCH and Path(before).name in (COMMAND, PACKAGE) for before, word in pairwise(words[:4])
    )


def ancestors() -> Iterator[Process]:
    """Yield the parent of this process, its parent, and so on, as far as they can be read."""
    pid = os.getppid()
    while pid > 1:
        found = process_stat(pid)
        try:
            words = tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0"))
        except OSError:
            return
        if found is None:
            return
        yield Process(pid, found[2], words if len(words) > 1 else tuple(words[0].split()))
        pid = int(found[1])


def process_stat(pid: int) -> tuple[str, str, str] | None:
    """Return state, parent and start of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[1], fields[19]


def process_age_s() -> float:
    """Return the seconds since this process was started."""
    found = process_stat(os.getpid())
    assert found is not None, "this process is there"
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(found[2]) / os.sysconf("SC_CLK_TCK")


def stop_without_launcher(number: signal.Signals) -> None:
    """From now on send this process the signal `number`, once, when a launcher above it has ended."""
    launchers = [process for process in ancestors() if process.program]
    if launchers:
        threading.Thread(target=_watch, args=(launchers, number), daemon=True, name="launcher watch").start()


def _watch(launchers: list[Process], number: signal.Signals) -> None:
    while all(process.is_alive for process in launchers):
        time.sleep(INTERVAL_S)
    gone = next(process for process in launchers if not process.is_alive)
    logger.info("%s (process %d), which started this run, is gone: stopping", gone.program, gone.pid)
    os.kill(os.getpid(), number)
