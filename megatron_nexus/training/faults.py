"""Faults: what asks a run to save and exit, and steps that are not finite."""

import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from megatron_nexus.base.json_text import parse_json
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.run_dir import checkpoint_name, complete_checkpoints
from megatron_nexus.config.exit_signals import handle
from megatron_nexus.errors import TrainingError
from megatron_nexus.parallel.host_tree import HostTree
from megatron_nexus.parallel.launcher_watch import process_age_s
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import StepResult
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import (
    METRICS_FILE,
    Evaluation,
    StepMetrics,
    Validation,
    read_metrics,
    training_curve,
)

GRACE_PERIOD_S = 1.0
STOP_FILE = "stop"
"""In a run's folder: whoever creates it asks the run to save and exit."""


class StopRequest:
    """Whether this rank was asked to stop: by a signal, by a file, or because its time is up.

    The ranks agree at the end of each step. Ctrl-C in a terminal reaches every process of the run, a
    launcher's SIGTERM may reach some first, and SLURM's `--signal=USR1@120` comes before the time limit. A
    second Ctrl-C ends the process at once: what was being saved is not a checkpoint then, and the one before
    it still is.
    """

    def __init__(
        self, exit_signals: Sequence[signal.Signals], minutes: float = 0.0, file: Path | None = None
    ) -> None:
        """`minutes` after the start of this process its time is up, if above 0; `file` is looked for."""
        self.signal_name = ""
        self._asked = self._looked = 0.0
        self._minutes, self._file = minutes, file
        self._deadline = time.monotonic() + 60.0 * minutes - process_age_s() if minutes else math.inf
        self._found_file = False
        handle(exit_signals, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass on the Ctrl-C that the terminal has sent already: that is not a second one.
        if self.signal_name and number == signal.SIGINT and time.monotonic() - self._asked > GRACE_PERIOD_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if not self.signal_name:
            self.signal_name, self._asked = signal.Signals(number).name, time.monotonic()

    @property
    def is_asked(self) -> bool:
        """Whether this rank was asked to stop. Looks for the file once a second."""
        now = time.monotonic()
        if self._file is not None and now - self._looked > 1.0:
            self._looked, self._found_file = now, self._file.exists()
        return bool(self.signal_name) or self._found_file or now > self._deadline

    def acknowledge(self) -> str:
        """Return why the run stops. Deletes the file: the next start of the run is not to stop again."""
        if self.signal_name:
            return f"received {self.signal_name}"
        if self._found_file and self._file is not None:
            self._file.unlink(missing_ok=True)
            return f"found {self._file}"
        if time.monotonic() > self._deadline:
            return f"--exit-duration-in-mins {self._minutes:g} is over"
        return "another rank was asked to stop"


def is_finite(result: StepResult) -> bool:
    """Return whether a step can be trusted: neither its loss nor its gradient norm is inf or NaN."""
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def non_finite_error(
    mesh: Mesh, step: int, result: StepResult, found_here: str, remedy: str
) -> TrainingError:
    """Return the error of a step that is not finite; a collective call.

    `found_here` is what `Engine.diagnose` found on this rank, `remedy` says where to resume.
    """
    found = mesh.control.all_gather_str(found_here)
    where = next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), "no rank repeats it")
    return TrainingError(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite ({where}); lower "
        f"--lr or lengthen --lr-warmup-iters, and {remedy}"
    )


class FiniteCheckpoints(Hook):
    """Knows which checkpoints hold weights that have given a finite loss."""

    def __init__(self) -> None:
        self._checkpoints: dict[int, Location] = {}  # that this run has loaded or saved, by step
        self._finite_step = -1  # of the newest weights that have given a finite loss

    def after_step(self, metrics: StepMetrics) -> None:
        """Note the step: its loss is that of the weights before it."""
        if math.isfinite(metrics.loss):  # that of a skipped step may not be
            self._finite_step = metrics.step - 1

    def after_evaluation(self, found: Evaluation) -> None:
        """Note a finite validation, which is one of the weights as they are."""
        if isinstance(found, Validation) and math.isfinite(found.validation_loss):
            self._finite_step = found.step

    def after_save(self, step: int, folder: Location) -> None:
        """Note a checkpoint that was saved, or loaded."""
        self._checkpoints[step] = folder

    def remember(self, control: HostTree, save: Location, run_dir: Path, last_step: int) -> None:
        """Know those of earlier starts of the run, up to `last_step`; a collective call.

        The one that was resumed may hold the weights that a spike follows.
        """
        known = ""
        if control.rank == 0:
            curve = training_curve(read_metrics(run_dir / METRICS_FILE))
            finite = [step for step, loss in curve if step <= last_step and math.isfinite(loss)]
            steps = [step for step in complete_checkpoints(save) if step <= last_step]
            known = json.dumps([max(finite, default=0) - 1, steps])
        finite_step, steps = parse_json(control.broadcast_str(known))
        self._finite_step = max(self._finite_step, finite_step)
        self._checkpoints = {**{s: save / checkpoint_name(s) for s in steps}, **self._checkpoints}

    def last_good(self) -> Location | None:
        """Return the last checkpoint whose weights have given a finite loss, and which is still there."""
        steps = sorted((step for step in self._checkpoints if step <= self._finite_step), reverse=True)
        return next((folder for step in steps if (folder := self._checkpoints[step]).exists()), None)

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        """Forget the steps after the one that the run has gone back to."""
        self._finite_step = min(self._finite_step, step)

    def way_back(self) -> str:
        """Return where to resume after a step that is not finite."""
        if good := self.last_good():
            return f"resume with --load {good}, the last checkpoint whose weights gave a finite loss"
        if self._checkpoints:
            held = self._checkpoints[max(self._checkpoints)]
            return f"start again: {held} holds weights that never gave a finite loss"
        return "start again: no checkpoint was saved"
