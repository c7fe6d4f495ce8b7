"""Durable files: locks between processes, fsync, and files and folders that appear complete or not at all.

A lock file must not be unlinked by anyone but its holder, and even then another process may have opened the
old file and lock it while a third one creates a new file of the same name. So whoever gets a lock checks that
the path still leads to the inode that was locked.

Some file systems have no flock(2): Lustre mounted without `-o flock`, NFS without its lock daemon. There
every lock is granted, and writers warn once.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from megatron_nexus.errors import CheckpointError
from megatron_nexus.log import logger

LOCK_FILE = ".lock"
DRAFT = ".tmp_"
"""Prefix of the name of what is not complete yet."""
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
ATTEMPTS = 100
"""How often a new folder may vanish: another process that created it is refused, and removes it."""
WRITE_BYTES = 1 << 20
"""Bytes written at once: one call with 64 MiB took ten times as long as 64 calls (Linux 6, ext4)."""

Write = Callable[[bytes | memoryview], None]


def shared_lock(path: Path) -> Callable[[], None]:
    """Keep others from locking a file, where the file system can; call the result to release it.

    Raises OSError if the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # a reader goes on without a lock
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return partial(os.close, descriptor)


@contextmanager
def exclusive_lock(
    path: Path, waiting: AbstractContextManager[object] | None = None, create: bool = True
) -> Iterator[int]:
    """Hold the lock of a file or a folder; yield its descriptor.

    `waiting` is entered while another process holds the lock; without it that raises BlockingIOError. A file
    that is missing is created, or without `create` raises FileNotFoundError. Raises OSError.
    """
    try:
        descriptor = _acquire(path, wait=False, create=create)
    except BlockingIOError:
        if waiting is None:
            raise
        with waiting:
            descriptor = _acquire(path, wait=True, create=create)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def dir_lock(folder: Path) -> Iterator[int]:
    """Hold the lock file of a folder, which is created if it is missing; yield the descriptor.

    Afterwards the lock file is removed, and so are those of the folders created here that are empty.

    Raises BlockingIOError if another process holds it, OSError if it cannot be created or written.
    """
    descriptor, made = _lock_dir(folder)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # a folder that is not empty stays, and so do those above it
            (folder / LOCK_FILE).unlink()
            for path in made:
                path.rmdir()
        os.close(descriptor)


def _acquire(path: Path, wait: bool, create: bool) -> int:
    while True:
        flags = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | (os.O_CREAT if create else 0)
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            _flock(descriptor, wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> None:
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


def _lock_dir(folder: Path) -> tuple[int, list[Path]]:
    """Return the locked file, and the folders created for it, innermost first."""
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for _ in range(ATTEMPTS):
        made = [above for above in (folder, *folder.parents) if not above.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _acquire(folder / LOCK_FILE, wait=False, create=True), made
        except (
            FileNotFoundError,
            FileExistsError,
        ) as error:  # another holder just removed the folder, or it is a file
            failure = error
    raise failure


def fsync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError: on a full disk the system does not give it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def durable_file(path: Path, start: int | None = None) -> Iterator[Write]:
    """Create a file that survives a power cut once the block ends. Raises OSError that names it.

    With `start` other processes write the same new file, and this one from that byte on.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if start is None else 0)
    with naming_errors(path), os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        file.seek(start or 0)

        def write(contents: bytes | memoryview) -> None:
            view = memoryview(contents)
            while view:
                view = view[file.write(view[:WRITE_BYTES]) :]

        yield write
        os.fsync(file.fileno())


@contextmanager
def atomic_file(path: Path) -> Iterator[Write]:
    """Create or replace a file at the end of the block, durably, or leave it alone. Raises OSError."""
    draft = path.with_name(f"{DRAFT}{path.name}")
    try:
        with durable_file(draft) as write:
            yield write
        draft.replace(path)
        fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_files(paths: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Yield a draft for each of some files of one folder; the end of the block names them, durably.

    A path whose draft was not written has no file then. The last file names the others: its old one is
    removed first and its new one appears last, so that no kill leaves a mixture of both. Raises OSError.
    """
    drafts = {path: path.with_name(f"{DRAFT}{path.name}") for path in paths}
    try:
        yield drafts
        for draft in drafts.values():
            if draft.exists():
                fsync(draft)
        paths[-1].unlink(missing_ok=True)
        for path, draft in drafts.items():
            if draft.exists():
                draft.replace(path)
            else:
                path.unlink(missing_ok=True)
        fsync(paths[0].parent)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk of a folder has too little space."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{folder} needs {size_in_words(needed_bytes)} and the disk has {size_in_words(free)}: make "
            "room, or save elsewhere"
        )


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield a folder to write in that becomes `folder`, durably, when the block ends without an error.

    It lies next to it as `.tmp_<name>`; what a killed process left there is cleared. `folder` does not exist
    or is empty.

    Raises BlockingIOError if another process is writing it, OSError.
    """
    draft = folder.with_name(f"{DRAFT}{folder.name}")
    draft.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(draft):
        try:
            for left in draft.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
            yield draft
            for path in (*draft.rglob("*"), draft):
                fsync(path)
            draft.rename(folder)
            fsync(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def size_in_words(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
