"""Hooks: what runs at six moments of the training loop, on every rank, in the order of the list.

The loop's own metrics and its memory of good checkpoints are hooks (`metrics`, `faults`). A hook that calls a
collective must do so on all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.log import logger
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.training.metrics import Evaluation, StepMetrics


class Hook:
    """Does nothing; override what is needed."""

    def after_step(self, metrics: StepMetrics) -> None:
        """Run after an optimizer step; its loss is finite unless its update was skipped."""

    def after_evaluation(self, found: Evaluation) -> None:
        """Run after each validation or test set and growth metrics, and on rank 0 after the tasks."""

    def after_save(self, step: int, folder: Location) -> None:
        """Run when a checkpoint is complete, also when the run has loaded it."""

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        """Run when the run has gone back to the checkpoint of a step; `record` says why."""

    def on_end(self) -> None:
        """Run when the run ends as it should, after its last save and evaluation."""

    def on_failure(self, error: BaseException) -> None:
        """Run on each rank whose run ends with an error, whatever it is: no collective here."""


@contextmanager
def telling_of_failures(hooks: Sequence[Hook], beacon: Beacon) -> Iterator[None]:
    """Tell hooks, also those that are added in the block, of the error that ends it, which is then raised.

    A hook that fails, as on a full disk, is logged.
    """
    try:
        yield
    except BaseException as error:
        beacon.mark(Phase.HOOKS)  # which may take longer than a phase of a step
        for hook in hooks:
            try:
                hook.on_failure(error)
            except Exception as failure:  # noqa: BLE001 - the run's own error is the one to raise
                logger.warning("%s: %s", type(hook).__name__, failure)
        raise
