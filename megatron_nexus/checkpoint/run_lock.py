"""The lock of a run's folder: two runs that save there would mix; a run that is refused leaves no folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_nexus.base.durable import LOCK_FILE, dir_lock
from megatron_nexus.errors import CheckpointError, ConfigError


@contextmanager
def run_dir_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; creates the folder if it is missing.

    Afterwards the lock is gone, and so are those of the folders made here in which nothing was written.

    Raises:
        ConfigError: another run holds the lock. On NFS it may reach this machine only.
        CheckpointError: the folder cannot be made or written.
    """
    with ExitStack() as held:
        try:
            lock = held.enter_context(dir_lock(folder))
        except BlockingIOError as error:
            user = ""
            with suppress(OSError):
                user = (folder / LOCK_FILE).read_text(errors="replace").strip()
            raise ConfigError(
                f"--save {folder} is in use by {user or 'another run'}: wait for it, or give another --save"
            ) from error
        except OSError as error:
            raise not_writable_error(folder, error) from error
        with suppress(OSError):  # on a full disk it says nothing
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def not_writable_error(folder: object, error: OSError) -> CheckpointError:
    """Return the error for a save folder that cannot be written, with its remedy."""
    return CheckpointError(
        f"--save {folder}: {error.strerror}: give a folder that can be written, on a disk that all ranks "
        "share"
    )
