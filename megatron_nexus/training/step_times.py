"""Step times: how long each phase of a step takes on every rank, and the rank for which the others wait.

A rank computes while it reads data and is in the forward and backward pass; it waits in the reduction of the
gradients, the exchange with other pipeline stages and the reduction of the loss. All ranks take equally long
for a step, however slow one of them is: what tells the slow one is that it computes longest. Names and levels
are those of Megatron-LM's timers.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median_low
from typing import TypeAlias

import torch

from megatron_nexus.base.duration import duration
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.log import logger
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import StepMetrics, Timers

COMPUTES = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD)
FIRST_STEPS = 2
"""First steps of a start, which compile and allocate memory: not counted."""
LEAST_S = 0.05
"""A rank that computes longer than the others by less, in a step, is no straggler: noise."""

Stamp: TypeAlias = "float | torch.cuda.Event"
_LEVELS: Mapping[int, Mapping[str, Sequence[Phase]]] = {
    0: {},
    1: {
        "forward-backward": (*COMPUTES, Phase.PIPELINE),
        "all-grads-sync": (Phase.REDUCTION,),
        "optimizer": (Phase.OPTIMIZER,),
        "loss-sync": (Phase.LOSS,),
    },
    2: {
        "batch-generator": (Phase.DATA,),
        "forward-compute": (Phase.FORWARD,),
        "backward-compute": (Phase.BACKWARD,),
        "pipeline-exchange": (Phase.PIPELINE,),
        "all-grads-sync": (Phase.REDUCTION,),
        "optimizer": (Phase.OPTIMIZER,),
        "loss-sync": (Phase.LOSS,),
        "between-steps": (Phase.HOOKS,),
    },
}
_TOTALS = {"evaluation": Phase.EVALUATION, "save-checkpoint": Phase.CHECKPOINT}
"""What is no part of a step: seconds in all."""


class PhaseClock:
    """Sums the time of this rank by phase: of the host on a CPU, of the stream on CUDA.

    On CUDA a mark records an event, which waits for nothing; what lies between two is read after the step,
    when the loss has been read and all is over. Not run on a GPU yet.
    """

    def __init__(self, device_type: str) -> None:
        self._on_cuda = device_type == "cuda"
        self._stamps: list[tuple[Phase, Stamp]] = []
        self.reset()

    def mark(self, phase: Phase) -> None:
        """Begin a phase."""
        self._stamps.append((phase, self._now()))

    def collect(self) -> None:
        """Add up the phases that are over, but for the last mark, which begins one."""
        for (phase, began), (_, ended) in pairwise(self._stamps):
            self.seconds[phase] += _between(began, ended)
        self.forget()

    def forget(self) -> None:
        """Count nothing of what came since the sums were added up last."""
        del self._stamps[:-1]

    def reset(self) -> None:
        """Reset the sums."""
        self.seconds = dict.fromkeys(Phase, 0.0)

    def _now(self) -> Stamp:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(began: Stamp, ended: Stamp) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event), "both of one clock"
    ended.synchronize()  # it is over, unless it is the mark behind the step
    return float(began.elapsed_time(ended)) / 1000.0


class StepTimes(Hook):
    """Shares the times of all ranks at --log-interval: names a straggler, and logs --timing-log-level."""

    def __init__(self, config: RunConfig, mesh: Mesh, beacon: Beacon, hooks: Sequence[Hook]) -> None:
        """Watch the marks of `beacon`; `hooks` receive the times."""
        self._config, self._mesh, self._beacon, self._hooks = config, mesh, beacon, hooks
        self._clock = PhaseClock(mesh.device.type)
        self._names = _LEVELS[self._config.logging.timing_log_level]
        self._steps = -FIRST_STEPS
        self._shares = bool(self._names) or (
            mesh.world_size > 1 and self._config.logging.straggler_threshold > 0
        )
        if self._shares:
            beacon.observer = self._clock.mark

    def after_step(self, metrics: StepMetrics) -> None:
        """Sum up a step; share the sums where a line is due. A collective call then."""
        if not self._shares:
            return
        self._clock.collect()
        self._steps += 1
        if self._steps == 0:
            self._clock.reset()
        if self._steps <= 0 or metrics.step % self._config.logging.log_interval:
            return
        self._beacon.mark(Phase.TIMES)  # a rank that is lost here is missed as soon as within a step
        every = torch.zeros(self._mesh.world_size, len(Phase), dtype=torch.float64)
        every[self._mesh.rank] = torch.tensor([*self._clock.seconds.values()])
        self._mesh.control.all_reduce(every)
        of_ranks = [dict(zip(Phase, seconds, strict=True)) for seconds in every.tolist()]
        self._name_straggler([sum(one[phase] for phase in COMPUTES) / self._steps for one in of_ranks])
        self._beacon.mark(Phase.HOOKS)
        if self._names and self._mesh.rank == 0:
            self._log(metrics.step, of_ranks)
        self._steps = 0
        self._clock.reset()

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        """Leave out the step that was given up, and the way back: no step is counted for them."""
        self._clock.forget()

    def _name_straggler(self, busy_s: Sequence[float]) -> None:
        """Log which rank the others wait for; a collective call where there is one."""
        stages = self._mesh.pp_size
        slow = straggler(busy_s, stages, self._config.logging.straggler_threshold)
        if slow is None:
            return
        found, usual_s = slow
        mine = socket.gethostname() if self._mesh.rank == found else ""
        host = self._mesh.control.all_gather_str(mine)[found]
        if self._mesh.rank == 0:
            tp = self._mesh.tp_size
            group = f" (or another of its {tp} tensor-parallel ranks)" if tp > 1 else ""
            ranks = "ranks of its stage" if stages > 1 else "ranks"
            logger.info(
                f"straggler: rank {found} on {host}{group} computes {1e3 * busy_s[found]:.0f} ms a step, "
                f"{busy_s[found] / usual_s:.1f} x the median of the {ranks} ({1e3 * usual_s:.0f} ms): they "
                "wait for it"
            )

    def _log(self, step: int, of_ranks: Sequence[Mapping[Phase, float]]) -> None:
        """Log the timers of all ranks, and hand them on."""
        steps = self._steps
        times = {
            name: [sum(one[phase] for phase in phases) / steps for one in of_ranks]
            for name, phases in self._names.items()
        }
        times = {name: values for name, values in times.items() if max(values) > 0.0}
        totals = {name: max(one[phase] for one in of_ranks) for name, phase in _TOTALS.items()}
        option = self._config.logging.timing_log_option
        parts = [f"{name} {_shown(values, option)}" for name, values in times.items()]
        parts += [f"{name} {duration(seconds)} in all" for name, seconds in totals.items() if seconds > 1e-3]
        logger.info("timers, ms a step (%s of %d ranks): %s", option, len(of_ranks), " | ".join(parts))
        shared = Timers(step, {name: (min(values), max(values)) for name, values in times.items()})
        for hook in self._hooks:
            hook.after_evaluation(shared)


def straggler(busy_s: Sequence[float], stages: int, threshold: float) -> tuple[int, float] | None:
    """Return the rank that computes longest within its stage, and the median there; None: none does.

    That is `threshold` times the median or more. Stages differ in their work, so they are not compared.
    """
    of_stage = len(busy_s) // stages
    usual_s = [median_low(busy_s[first : first + of_stage]) for first in range(0, len(busy_s), of_stage)]
    slowest = max(range(len(busy_s)), key=lambda rank: busy_s[rank] - usual_s[rank // of_stage])
    usual = usual_s[slowest // of_stage]
    is_slow = threshold > 0 and busy_s[slowest] >= max(threshold * usual, usual + LEAST_S)
    return (slowest, usual) if is_slow else None


def _shown(values: Sequence[float], option: str) -> str:
    """Return the times of the ranks in milliseconds, as --timing-log-option says."""
    if option == "all":
        return ",".join(f"{1e3 * value:.1f}" for value in values)
    most = f"{1e3 * max(values):.1f}"
    return most if option == "max" else f"{1e3 * min(values):.1f}-{most}"
