"""Spike policy: what is done about a step whose loss or gradient norm is a spike, or is not finite.

Its update is withheld and the step computed again from the master weights. Where the spike is gone it was a
transient fault of a machine, and the update is made: the run is what it would have been. A spike that comes
again is left to --spike-policy.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_nexus.config.run_config import TrainingConfig
from megatron_nexus.errors import TrainingError
from megatron_nexus.log import logger
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import Engine, StepResult
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from megatron_nexus.training.rank_batches import Batch
from megatron_nexus.training.spikes import SpikeDetector

MOST = 10
"""Updates left out one after the other, or rewinds: more are no accident, and the run ends."""


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
        known = ""
        if self._mesh.rank == 0:
            known = recent_steps(run_dir / METRICS_FILE, last_step, self._detector.length)
        self._detector.restore(self._mesh.control.broadcast_str(known))

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
                "step %d: loss %s, gradient norm %s; computed again %s and %s: a transient fault of a machine"
                ", of which nothing is kept",
                *(step, first.loss, first.grad_norm, result.loss, result.grad_norm),
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
        """Return what a spike is."""
        score = self._detector.score(result.loss, result.grad_norm)
        far = (
            f"{score:.1f} standard deviations above the last steps" if math.isfinite(score) else "not finite"
        )
        return f"loss {result.loss}, gradient norm {result.grad_norm}, twice: a spike, {far}"


def recent_steps(metrics: Path, last_step: int, length: int) -> str:
    """Return the last losses and gradient norms up to a step, as `SpikeDetector.restore` reads them."""
    return json.dumps(
        [
            (record["loss"], record["grad_norm"])
            for record in read_metrics(metrics)
            if "loss" in record and "grad_norm" in record and record["step"] <= last_step
        ][-length:]
    )
