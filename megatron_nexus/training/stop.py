"""Stop: signals that ask a run to save and leave, heeded between two steps by all ranks alike."""

import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

from megatron_nexus.config.exit_signals import handle
from megatron_nexus.parallel.mesh import Mesh

GRACE_PERIOD_S = 1.0


class StopRequest:
    """Remembers that a signal came to this rank; `agreed` returns whether it came to any.

    Ctrl-C in a terminal reaches every process of the run, a launcher's SIGTERM may reach some first, and
    SLURM's `--signal=USR1@120` comes before the time limit. A second Ctrl-C ends the process at once: what
    was being saved is not a checkpoint then, and the one before it still is.
    """

    def __init__(self, exit_signals: Sequence[signal.Signals]) -> None:
        self.signal_name = ""
        self._asked = 0.0
        handle(exit_signals, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass on the Ctrl-C that the terminal has sent already: that is not a second one.
        if self.signal_name and number == signal.SIGINT and time.monotonic() - self._asked > GRACE_PERIOD_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if not self.signal_name:
            self.signal_name, self._asked = signal.Signals(number).name, time.monotonic()

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank was asked to stop; a collective call of one byte on the host."""
        flag = torch.tensor([bool(self.signal_name)], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.control)
        return bool(flag.item())
