"""Fault injection: makes the faults of `--inject` happen: by signals, in gradients, as errors of open().

A fault happens once in a run's folder: what has happened is on record in `injected_faults.txt`, so that the
same command, started again, goes past it.
"""

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_nexus.config.injection import InjectedFault
from megatron_nexus.log import logger
from megatron_nexus.spec.param import ParamSpec

RECORD_FILE = "injected_faults.txt"
SPIKE_FACTOR = 1e4
"""Factor of the gradients of a `spike`."""


class FaultInjector:
    """Makes the faults of one rank happen at the beginnings of their steps."""

    def __init__(
        self,
        faults: Sequence[InjectedFault],
        rank: int,
        run_dir: Path,
        parameters: Mapping[str, tuple[ParamSpec, nn.Parameter]],
    ) -> None:
        """Warn of the faults to come; `parameters` are those that `nan`, `spike` and `bit_flip` touch."""
        self._record = run_dir / RECORD_FILE
        happened = self._record.read_text().splitlines() if faults and self._record.exists() else []
        self._done = {line.split(" ")[0] for line in happened}
        self._faults = [fault for fault in faults if fault.rank == rank and str(fault) not in self._done]
        self._run_dir = run_dir
        self._parameters = parameters
        self._visits = 0
        self._slower_s = 0.0
        if rank == 0:
            for fault in faults:
                said = f"--inject {fault}: a rehearsal, this run is not to be used"
                if str(fault) in self._done:
                    said = f"--inject {fault}: it has happened in this run, and will not again"
                logger.warning("WARNING: %s", said)

    def before_step(self, step: int) -> None:
        """Make the faults of a step happen; each is on record before it does."""
        self._visits += 1  # a step is begun again after a rewind
        for fault in [fault for fault in self._faults if fault.step == step]:
            self._faults.remove(fault)
            with self._record.open("a") as file:
                file.write(f"{fault} {datetime.now(UTC).isoformat(timespec='seconds')}\n")
            logger.warning("WARNING: injecting %s", fault)
            self._inject(fault)
        if self._slower_s:
            time.sleep(self._slower_s)

    def _inject(self, fault: InjectedFault) -> None:
        match fault.kind:
            case "rank_hung":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "rank_killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow_rank" if fault.seconds:
                self._slower_s = fault.seconds
            case "slow_rank":
                while True:  # alive, and never done
                    time.sleep(0.1)
            case "nan":
                self._scale_gradients(math.nan, once=True)
            case "spike":
                self._scale_gradients(SPIKE_FACTOR, once=False)
            case "bit_flip":
                self._flip_bit()
            case "disk_full":
                self._fill_disk()

    def _scale_gradients(self, factor: float, once: bool) -> None:
        """Multiply each gradient of this step; `once`: not when the step is computed again, as data would."""
        visit = self._visits
        for _, parameter in self._parameters.values():
            waiting = [None]

            def scaled(gradient: Tensor, waiting: list[None] = waiting) -> Tensor | None:
                if self._visits != visit or (once and not waiting):
                    return None
                waiting.clear()
                return gradient * factor

            parameter.register_hook(scaled)

    def _flip_bit(self) -> None:
        """Flip the exponent's highest bit in one weight of this rank's copy, not in the master weights."""
        # The last matrix: every token meets it, not only its own row as in the embedding.
        matrices = [(name, p) for name, (spec, p) in self._parameters.items() if len(spec.shape) == 2]
        name, parameter = matrices[-1]
        flat = parameter.detach().view(-1)
        kind, bit = (torch.int16, 14) if flat.element_size() == 2 else (torch.int32, 30)
        word = flat.view(kind)[flat.numel() // 2]
        word ^= 1 << bit
        logger.warning("WARNING: bit %d of element %d of %s is flipped", bit, flat.numel() // 2, name)

    def _fill_disk(self) -> None:
        """Have this process find no space when it opens a file of the run for writing, from now on."""
        folder = str(self._run_dir.absolute()) + os.sep

        def refuse(event: str, arguments: tuple[object, ...]) -> None:
            if event != "open" or not isinstance(arguments[0], str | os.PathLike):
                return
            path, flags = str(Path(os.fsdecode(arguments[0])).absolute()), arguments[2]
            if path.startswith(folder) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        sys.addaudithook(refuse)
