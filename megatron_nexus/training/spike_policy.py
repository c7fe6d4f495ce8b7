"""Spike policy: what is done about a step whose loss or gradient norm is a spike, or is not finite.

Its update is withheld and the step computed again from the master weights. Where the spike is gone it was a
transient fault of a machine, and the update is made: the run is what it would have been. A spike that comes
again is left to --spike-policy.

The score of a step is that of OLMo-core's SkipStepOptimizer (src/olmo_core/optim/skip_step_optimizer.py): how
many standard deviations a value lies above the mean of the last finite ones, of the loss and of the gradient
norm; by its defaults of 128 steps, from half as many on, and a spike lies more than 6 above.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_nexus.base.json_text import parse_record
from megatron_nexus.config.run_config import TrainingConfig
from megatron_nexus.errors import TrainingError
from megatron_nexus.log import logger
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import Engine, StepResult
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from megatron_nexus.training.rank_batches import Batch

MOST = 10
"""Updates left out one after the other, or rewinds: more are no accident, and the run ends."""


class SpikeDetector:
    """Knows the recent losses and gradient norms of a run, alike on every rank."""

    def __init__(self, length: int, sigmas: float) -> None:
        """Remember `length` steps; a spike lies more than `sigmas` standard deviations above their mean."""
        self.length, self._sigmas = length, sigmas
        self.restore(())

    def restore(self, steps: Iterable[tuple[float, float]]) -> None:
        """Remember these losses and gradient norms alone, the oldest first."""
        self._losses: deque[float] = deque(maxlen=self.length)
        self._norms: deque[float] = deque(maxlen=self.length)
        for loss, norm in steps:
            self.add(loss, norm)

    def add(self, loss: float, norm: float) -> None:
        """Remember a step; an update that was left out may have an infinite norm."""
        self._losses.append(loss)
        self._norms.append(norm)

    def score(self, loss: float | None, norm: float) -> float:
        """Return by how many standard deviations a step lies too high; infinity where it is not finite.

        0 while too few steps are known. A loss of None is not looked at.
        """
        of_norm = self._of(norm, self._norms)
        return of_norm if loss is None else max(of_norm, self._of(loss, self._losses))

    def admits(self, loss: float | None, norm: float) -> bool:
        """Return whether a step is no spike."""
        return self.score(loss, norm) <= self._sigmas

    def _of(self, value: float, before: deque[float]) -> float:
        if not math.isfinite(value):
            return math.inf
        finite = [one for one in before if math.isfinite(one)]
        if len(before) + 1 < max(2, self.length // 2) or len(finite) < 2:
            return 0.0
        above, deviation = value - statistics.fmean(finite), statistics.stdev(finite)
        if above <= 0.0:
            return 0.0
        return above / deviation if deviation else math.inf


class SpikePolicy:
    """Takes the steps of a run with --spike-policy."""

    def __init__(self, training: TrainingConfig, engine: Engine, mesh: Mesh) -> None:
        self._policy = training.spike_policy
        self._detector = SpikeDetector(training.spike_rolling_interval, training.spike_sigma_factor)
        self._engine, self._mesh = engine, mesh
        self._in_a_row = 0
        self.described = ""
        """What the last spike was."""

    def remember(self, run_dir: Path, last_step: int) -> None:
        """Know a run's steps up to `last_step`, as if it had never stopped; a collective call."""
        known: list[tuple[float, float]] = []
        if self._mesh.rank == 0:
            known = recent_steps(run_dir / METRICS_FILE, last_step, self._detector.length)
        self._detector.restore(parse_record(self._mesh.control.broadcast_str(json.dumps(known))))

    def take(
        self,
        step: int,
        batches: Iterator[Batch],
        again: Callable[[], Iterator[Batch]],
        rate: float,
        flags: Callable[[], Sequence[bool]],
    ) -> StepResult:
        """Take an optimizer step; `again` returns its micro-batches once more. A collective call.

        A result that was not made is a spike that came again, to be left out or rewound; the caller ends the
        run where `ends`.
        """
        before = self._engine.state.counters
        first = result = self._engine.train_step(batches, rate, flags, self._detector.admits)
        if not first.was_made:
            self._engine.state.counters = before
            self._engine.state.refresh_model()  # the model's own weights may be what was wrong
            result = self._engine.train_step(again(), rate, lambda: first.flags, self._detector.admits)
        if result.was_made and not first.was_made and self._mesh.rank == 0:
            logger.warning(
                f"step {step}: loss {first.loss}, gradient norm {first.grad_norm}; computed again "
                f"{result.loss} and {result.grad_norm}: a transient fault of a machine, of which nothing is "
                "kept"
            )
        self._in_a_row = 0 if result.was_made else self._in_a_row + 1
        if not result.was_made:
            self.described = self._describe(result)
            if self._mesh.rank == 0:
                logger.warning("step %d: %s: --spike-policy %s", step, self.described, self._policy)
        self._detector.add(result.loss, result.grad_norm)
        return result

    def ends(self, rewinds: int) -> bool:
        """Return whether the run is to end after a spike."""
        return self._policy == "stop" or max(self._in_a_row, rewinds) >= MOST

    def error(self, step: int, way_back: str) -> TrainingError:
        """Return the error of the last spike, where it ends the run; `way_back` says where to resume."""
        others = {"stop": ", or use --spike-policy skip or rewind", "rewind": ", or use --spike-policy skip"}
        return TrainingError(
            f"step {step}: {self.described}: it comes from the data or the learning rate; lower --lr"
            f"{others.get(self._policy, '')}, and {way_back}"
        )

    def _describe(self, result: StepResult) -> str:
        score = self._detector.score(result.loss, result.grad_norm)
        far = (
            f"{score:.1f} standard deviations above the last steps" if math.isfinite(score) else "not finite"
        )
        return f"loss {result.loss}, gradient norm {result.grad_norm}, twice: a spike, {far}"


def recent_steps(metrics: Path, last_step: int, length: int) -> list[tuple[float, float]]:
    """Return the last losses and gradient norms up to a step, as `SpikeDetector.restore` reads them."""
    return [
        (record["loss"], record["grad_norm"])
        for record in read_metrics(metrics)
        if "loss" in record and "grad_norm" in record and record["step"] <= last_step
    ][-length:]
