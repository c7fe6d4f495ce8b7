"""Faults: signals that ask a run to save and exit, and steps that are not finite."""

import math
import signal
import time
from collections.abc import Sequence
from types import FrameType

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.config.exit_signals import handle
from megatron_nexus.errors import TrainingError
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import StepResult
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import Evaluation, StepMetrics, Validation

GRACE_PERIOD_S = 1.0


class StopRequest:
    """Remembers that a signal came to this rank; the ranks agree at the end of each step.

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

    @property
    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return bool(self.signal_name)


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
        self._finite_step = metrics.step - 1

    def after_evaluation(self, found: Evaluation) -> None:
        """Note a finite validation, which is one of the weights as they are."""
        if isinstance(found, Validation) and math.isfinite(found.validation_loss):
            self._finite_step = found.step

    def after_save(self, step: int, folder: Location) -> None:
        """Note a checkpoint that was saved, or loaded."""
        self._checkpoints[step] = folder

    def way_back(self) -> str:
        """Return where to resume after a step that is not finite."""
        good = [
            folder
            for step, folder in sorted(self._checkpoints.items())
            if step <= self._finite_step and folder.exists()
        ]
        if good:
            return f"resume with --load {good[-1]}, the last checkpoint whose weights gave a finite loss"
        if self._checkpoints:
            held = self._checkpoints[max(self._checkpoints)]
            return f"start again: {held} holds weights that never gave a finite loss"
        return "start again: no checkpoint was saved"
