"""Stop: signals that ask a run to save and leave, heeded between two steps by all ranks alike."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_nexus.parallel.mesh import Mesh

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal came to this rank; `agreed` tells whether it came to any.

    Ctrl-C in a terminal reaches every process of the run, a launcher's SIGTERM may reach some first, and
    SLURM's `--signal=USR1@120` comes before the time limit.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank was asked to stop; a collective call of one byte on the host."""
        flag = torch.tensor([bool(self.signal_name)], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.control)
        return bool(flag.item())
