"""Holds: whoever reads a checkpoint holds a shared lock on its manifest, and held ones are not deleted.

The lock ends with the process that has it. On NFS it may reach this machine only.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_nexus.checkpoint.manifest import MANIFEST_FILE


def hold(folder: Path) -> int:
    """Keep a checkpoint from being deleted until the returned descriptor is closed. Raises OSError."""
    descriptor = os.open(folder / MANIFEST_FILE, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextmanager
def unless_held(folder: Path) -> Iterator[bool]:
    """Whether nobody reads a checkpoint; then nobody begins to in the context. Raises OSError."""
    with (folder / MANIFEST_FILE).open("r+b") as file:  # NFS grants an exclusive lock to writers only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
