"""Retention: which checkpoints of a run are kept once a newer one is complete."""

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.run_dir import checkpoint_name, complete_checkpoints, latest_step
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.errors import CheckpointError
from megatron_nexus.log import logger


def outdated(steps: list[int], latest: int, keep_latest: int, keep_every: int) -> list[int]:
    """Return the steps to delete among those of complete checkpoints; none is newer than `latest`.

    The newest `keep_latest` are kept, all where it is 0, and the multiples of `keep_every`, if it is not 0.
    """
    until_latest = sorted(step for step in steps if step <= latest)
    older = until_latest[:-keep_latest] if keep_latest else []
    return [step for step in older if not keep_every or step % keep_every]


def delete_outdated(root: Location, keep_latest: int, keep_every: int = 0) -> None:
    """Delete the checkpoints in a run's folder that `outdated` names.

    Only complete ones that `latest` names a newer one than, that nobody reads, and that lie in this folder
    themselves (links and their targets are left alone). A checkpoint that cannot be deleted is reported and
    tried again next time.
    """
    latest = latest_step(root)
    if latest is None or not keep_latest:
        return
    try:
        folder_of(root).clear_deleted()
        checkpoints = complete_checkpoints(root)
        for step in outdated(list(checkpoints), latest, keep_latest, keep_every):
            folder = checkpoints[step]
            if folder.is_symlink() or folder.name != checkpoint_name(step):
                continue
            if not folder_of(folder).delete():
                logger.info("%s is being read: it will be deleted later", folder)
    except (OSError, CheckpointError) as error:
        logger.warning("old checkpoints are left: %s", error)
