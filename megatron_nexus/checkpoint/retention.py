"""Retention: which checkpoints of a run are kept once a newer one is complete, and how the others go.

SAVE/.deleted_iter_0000100/  a checkpoint on its way out; nobody takes it for one
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.checkpoint.hold import unless_held
from megatron_nexus.checkpoint.run_folder import checkpoint_name, complete_checkpoints, latest_step
from megatron_nexus.checkpoint.store import sync_folder
from megatron_nexus.log import logger

_DELETED = ".deleted_"


@dataclass(frozen=True)
class Retention:
    """The newest `keep_latest` checkpoints are kept, and those of the multiples of `keep_every` steps.

    All are kept where `keep_latest` is 0; no step is special where `keep_every` is 0.
    """

    keep_latest: int = 0
    keep_every: int = 0

    def outdated(self, steps: list[int], latest: int) -> list[int]:
        """Of the steps of complete checkpoints those to delete; none is newer than `latest`."""
        until_latest = sorted(step for step in steps if step <= latest)
        older = until_latest[: -self.keep_latest] if self.keep_latest else []
        return [step for step in older if not self.keep_every or step % self.keep_every]


KEEP_ALL = Retention()


def delete_outdated(root: Path, retention: Retention) -> None:
    """Delete the checkpoints in a run's folder that are to be kept no longer.

    Only complete ones that `latest` names a newer one than, that nobody reads, and that lie in this folder
    themselves: of a link neither the name nor what it points to is touched. What cannot be deleted is told
    and left to the next time.
    """
    latest = latest_step(root)
    if latest is None or not retention.keep_latest:
        return
    try:
        for dead in root.glob(f"{_DELETED}iter_*"):
            shutil.rmtree(dead)
        checkpoints = complete_checkpoints(root)
        for step in retention.outdated(list(checkpoints), latest):
            folder = checkpoints[step]
            if folder.is_symlink() or folder.name != checkpoint_name(step):
                continue
            with unless_held(folder) as free:
                if not free:
                    logger.info("%s is being read: it will be deleted later", folder)
                    continue
                dying = folder.rename(root / f"{_DELETED}{folder.name}")
                sync_folder(root)
            shutil.rmtree(dying)
    except OSError as error:
        logger.warning("%s: %s: old checkpoints are left", error.filename or root, error.strerror)
