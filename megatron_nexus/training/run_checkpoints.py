"""The checkpoints that a run writes, one at a time, and the newest of them."""

from collections.abc import Sequence
from functools import partial

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.train_state import TrainState
from megatron_nexus.checkpoint.writer import CheckpointWriter, Saved, SaveRequest
from megatron_nexus.config.files_config import CheckpointConfig
from megatron_nexus.log import logger
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.run_times import RunTimes


class RunCheckpoints:
    """Saves, and tells the hooks of each checkpoint that is complete; all methods but one are collective.

    They raise CheckpointError where a save failed.
    """

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        folder: Location,
        state: TrainState,
        mesh: Mesh,
        beacon: Beacon,
        times: RunTimes,
        hooks: Sequence[Hook],
    ) -> None:
        self.folder = folder
        self.newest: Location | None = None
        """The last that was saved or loaded."""
        self._is_async, self._beacon, self._times, self._hooks = checkpoint.async_save, beacon, times, hooks
        self._writer = CheckpointWriter(
            folder,
            state,
            mesh,
            checkpoint.keep_latest,
            checkpoint.keep_every,
            partial(beacon.goes_on, Phase.CHECKPOINT),
            checkpoint.ckpt_files_per_node,
        )

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes a checkpoint in the background."""
        return self._writer.is_writing

    def save(self, request: SaveRequest, in_background: bool) -> None:
        """Write a checkpoint, after the one that is being written."""
        with self._times.span("checkpoint"):
            self.finish()
            self._writer.begin(request, in_background)
            if not in_background:
                self.finish()

    def settle(self) -> None:
        """Complete a save whose writing is over on all ranks."""
        if self._writer.is_busy:
            self._beacon.mark(Phase.CHECKPOINT)
            with self._times.span("checkpoint"):
                self._saved(self._writer.settle())

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        self._beacon.mark(Phase.CHECKPOINT)
        with self._times.span("checkpoint"):
            self._saved(self._writer.finish())

    def _saved(self, saved: Saved | None) -> None:
        if saved is not None:
            blocked = f" (training blocked for {saved.stall_s:.2f} s)" if self._is_async else ""
            logger.info("saved %s in %.1f s%s", saved.folder, saved.total_s, blocked)
            self.complete(saved.step, saved.folder)

    def complete(self, step: int, folder: Location) -> None:
        """Tell the hooks of a checkpoint that was saved, or loaded; no collective call."""
        self.newest = folder
        for hook in self._hooks:
            hook.after_save(step, folder)
