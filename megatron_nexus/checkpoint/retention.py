"""Retention: which checkpoints of a run are kept once a newer one is complete."""

from dataclasses import dataclass

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.run_dir import checkpoint_name, complete_checkpoints, latest_step
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.errors import CheckpointError
from megatron_nexus.log import logger


@dataclass(frozen=True)
class Retention:
    """The newest `keep_latest` checkpoints are kept, and those of the multiples of `keep_every` steps.

    All are kept where `keep_latest` is 0; no step is special where `keep_every` is 0.
    """

    keep_latest: int = 0
    keep_every: int = 0

    def outdated(self, steps: list[int], latest: int) -> list[int]:
        """Return the steps to delete among those of complete checkpoints; none is newer than `latest`."""
        until_latest = sorted(step for step in steps if step <= latest)
        older = until_latest[: -self.keep_latest] if self.keep_latest else []
        return [step for step in older if not self.keep_every or step % self.keep_every]


KEEP_ALL = Retention()


def delete_outdated(root: Location, retention: Retention) -> None:
    """Delete the checkpoints in a run's folder that `retention` does not keep.

    Only complete ones that `latest` names a newer one than, that nobody reads, and that lie in this folder
    themselves (links and their targets are left alone). A checkpoint that cannot be deleted is reported and
    tried again next time.
    """
    latest = latest_step(root)
    if latest is None or not retention.keep_latest:
        return
    try:
        folder_of(root).clear_deleted()
        checkpoints = complete_checkpoints(root)
        for step in retention.outdated(list(checkpoints), latest):
            folder = checkpoints[step]
            if folder.is_symlink() or folder.name != checkpoint_name(step):
                continue
            if not folder_of(folder).delete():
                logger.info("%s is being read: it will be deleted later", folder)
    except (OSError, CheckpointError) as error:
        logger.warning("old checkpoints are left: %s", error)
