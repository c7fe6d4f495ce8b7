"""File locks: one process at a time, as far as the file system can tell.

A lock file that is removed could be locked by who had opened it before, beside the one who makes it anew. So
it is removed only by who holds it, and who gets a lock looks whether the path still leads to that file.

Some file systems have no flock(2): Lustre mounted without `-o flock`, NFS without its lock daemon. There
every lock is granted, and a warning says so once. Readers need none and are told nothing.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from megatron_nexus.log import logger

LOCK_FILE = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
ATTEMPTS = 100
"""How often a new folder may vanish: another process that made it is refused, and removes it."""


def lock(descriptor: int, wait: bool = False) -> None:
    """Lock an open file for this process alone. Raises BlockingIOError where another one has, or OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn(str(Path(f"/proc/self/fd/{descriptor}").readlink().parent), os.strerror(error.errno))


@cache
def _warn(folder: str, reason: str) -> None:
    logger.warning(
        "warning: %s is on a file system without file locks (flock: %s): nothing keeps two runs from writing "
        "there at once, or a checkpoint from being deleted while it is read: see to it that only one writes",
        folder,
        reason,
    )


def share(path: Path) -> Callable[[], None]:
    """Keep others from locking a file until what is returned is called, where that can be had.

    Raises OSError where the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # a reader goes on without a lock
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return partial(os.close, descriptor)


def acquire(path: Path, wait: bool = False) -> int:
    """Open a file, which is made where it is missing, or a folder, and lock it: the descriptor to close.

    Raises BlockingIOError where another process has locked it, unless `wait`; OSError.
    """
    while True:
        flags = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            lock(descriptor, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int]:
    """Hold the lock of a file or a folder; raises as `acquire` does."""
    descriptor = acquire(path, wait)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[int]:
    """Hold the lock file of a folder, which is made where it is missing; its descriptor.

    Afterwards the lock is gone, and so are those of the folders made here in which nothing was written.

    Raises BlockingIOError where another process holds it, OSError where it cannot be made or written.
    """
    descriptor, made = _lock_folder(folder)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # what is not empty stays, and what lies above it
            (folder / LOCK_FILE).unlink()
            for path in made:
                path.rmdir()
        os.close(descriptor)


def _lock_folder(folder: Path) -> tuple[int, list[Path]]:
    """The locked file, and the folders made for it, innermost first."""
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for _ in range(ATTEMPTS):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return acquire(folder / LOCK_FILE), made
        except FileNotFoundError as error:
            failure = error
    raise failure
