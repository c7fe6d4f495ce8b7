"""The lock of a run's folder: two runs that save there would mix; and a run that is refused leaves no folder.

A lock file that is removed could be locked by who had opened it before, beside the one who makes it anew. So
it is removed only by who holds it, and who gets a lock looks whether the file is still the one of that name.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from megatron_nexus.errors import CheckpointError, ConfigError

LOCK_FILE = ".lock"
ATTEMPTS = 100
"""How often a folder may vanish that was just made: another run that made it is refused and removes it."""


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made where it is missing.

    Afterwards the lock is gone, and so are those of the folders made here in which nothing was written.

    Raises:
        ConfigError: another run holds the lock. On NFS it may reach this machine only.
        CheckpointError: the folder cannot be made or written.
    """
    file, made = _lock(folder)
    with file:
        with suppress(OSError):  # on a full disk it says nothing
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # what is not empty stays, and what lies above it
                (folder / LOCK_FILE).unlink()
                for path in made:
                    path.rmdir()


def unwritable(folder: object, error: OSError) -> CheckpointError:
    """That a run cannot save in a folder, and what to do."""
    return CheckpointError(
        f"--save {folder}: {error.strerror}: give a folder that can be written, on a disk that all ranks "
        "share"
    )


def _lock(folder: Path) -> tuple[FileIO, list[Path]]:
    """The lock file, open, empty and locked, and the folders made for it, innermost first."""
    path = folder / LOCK_FILE
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for _ in range(ATTEMPTS):
        try:
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        except FileNotFoundError as error:
            failure = error
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            user = file.read().decode().strip() or "another run"
            file.close()
            raise ConfigError(
                [f"--save {folder} is in use by {user}: wait for it, or give another --save"]
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file, made
        file.close()
    raise unwritable(folder, failure) from failure
