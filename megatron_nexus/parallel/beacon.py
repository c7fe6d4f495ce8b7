"""Beacon: where a rank is, its step, phase and time, in memory that the other ranks of its machine can read.

The memory has no name in any file system (memfd_create): others open it through /proc/PID/fd, also while the
process is stopped, and it is gone with the process. Setting a beacon is one write of 32 bytes.
"""

import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megatron_nexus.parallel.launcher_watch import process_stat

FIRST_STEPS, RECENT_STEPS = 2, 32
_RECORD = struct.Struct("=qqqd")  # step, marks in this step, phase, when


class Phase(IntEnum):
    """What a rank does, in the order of an optimizer step."""

    words: str

    def __new__(cls, number: int, words: str = "") -> "Phase":
        phase = int.__new__(cls, number)
        phase._value_, phase.words = number, words
        return phase

    STARTING = 0, "start"
    DATA = 1, "reading data"
    FORWARD = 2, "forward pass"
    BACKWARD = 3, "backward pass"
    PIPELINE = 4, "exchange with a pipeline stage"
    REDUCTION = 5, "reduction of the gradients"
    OPTIMIZER = 6, "optimizer"
    LOSS = 7, "reduction of the loss"
    TIMES = 8, "exchange of step times"
    HOOKS = 9, "between steps"
    EVALUATION = 10, "evaluation"
    CHECKPOINT = 11, "checkpoint"

    def __str__(self) -> str:
        return self.words


GONE, STOPPED = "its process was killed, or left", "its process is stopped (SIGSTOP, or a debugger)"
IN_STEP = tuple(phase for phase in Phase if Phase.DATA <= phase <= Phase.TIMES)


@dataclass(frozen=True, order=True)
class Place:
    """Where a rank is: the step, how often it has changed its phase in it, and the phase."""

    step: int
    marks: int
    phase: int

    def __str__(self) -> str:
        return f"step {self.step}, {Phase(self.phase)}"


class Beacon:
    """The place of this rank, and since when it has been there."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("megatron_nexus_beacon", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, _RECORD.size)
        self._memory = mmap.mmap(self.descriptor, _RECORD.size)
        self._step = self._marks = self._steps = 0
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.observer: Callable[[Phase], None] | None = None
        """Is called by the rank's own thread where a phase begins."""
        self.leaving: Callable[[], None] | None = None
        """Is called once, by the rank's own thread, before it goes on to another phase."""
        self.mark(Phase.STARTING)

    @contextmanager
    def in_step(self, step: int) -> Iterator[None]:
        """Say that the block takes an optimizer step; how long those after the first take is remembered."""
        self._step, self._marks, began = step, 0, time.monotonic()
        self.mark(Phase.DATA)
        yield
        self.mark(Phase.HOOKS)
        self._steps += 1
        if self.is_warm:
            self._recent_s.append(time.monotonic() - began)

    def mark(self, phase: Phase) -> None:
        """Say what this rank does from now on."""
        if (leave := self.leaving) is not None:
            self.leaving = None
            leave()
        self._phase = phase
        self._show(phase)
        if self.observer is not None:
            self.observer(phase)

    def goes_on(self, phase: Phase) -> None:
        """Say that work in `phase` makes progress, also from another thread; nothing in another phase."""
        if self._phase == phase:
            self._show(phase)

    def _show(self, phase: Phase) -> None:
        self._marks += 1
        _RECORD.pack_into(self._memory, 0, self._step, self._marks, phase, time.monotonic())

    @property
    def is_warm(self) -> bool:
        """Whether the first steps are over, in which kernels are compiled and memory is found."""
        return self._steps >= FIRST_STEPS

    @property
    def longest_step_s(self) -> float:
        """The longest of the recent steps after the first."""
        return max(self._recent_s, default=0.0)

    def read(self) -> tuple[Place, float]:
        """Return the place, and the seconds that this rank has been there."""
        return _parsed(self._memory[:])


@dataclass(frozen=True)
class Neighbour:
    """Another rank of this machine: its process and the descriptor of its beacon."""

    rank: int
    pid: int
    descriptor: int

    @property
    def state(self) -> str:
        """What the kernel says of its process: "" where it runs, or waits for something."""
        found = process_stat(self.pid)
        if found is None or found[0] in "ZX":
            return GONE
        return STOPPED if found[0] in "Tt" else ""

    def read(self) -> tuple[Place, float] | None:
        """Return its place and for how long it has been there; None where that cannot be read."""
        try:
            return _parsed(Path(f"/proc/{self.pid}/fd/{self.descriptor}").read_bytes())
        except (OSError, struct.error):
            return None


def _parsed(contents: bytes) -> tuple[Place, float]:
    step, marks, phase, when = _RECORD.unpack(contents)
    return Place(step, marks, phase), time.monotonic() - when
