"""A folder of files for others: it appears when it is complete, and nothing is ever overwritten.

It is written beside its place as `.tmp_<name>` and renamed. After a kill, which nothing can tidy, the next
conversion to the same place clears that away; two at once are told from it by a lock.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_nexus.base.file_lock import acquire
from megatron_nexus.errors import CheckpointError, ConfigError

TEMPORARY = ".tmp_"


def check_is_new(folder: Path) -> None:
    """Raise ConfigError where a folder cannot be made new. Only looks."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        held = "is a file" if not folder.is_dir() else "holds files"
        raise ConfigError([f"{folder} {held}, and nothing is ever overwritten: give another folder"])


@contextmanager
def atomic_dir(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` when the context is left without an error.

    Raises:
        ConfigError: as `check_is_new`, or another process writes it.
        CheckpointError: it cannot be written, or does not fit on the disk.
    """
    check_is_new(folder)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = acquire(temporary)
    except BlockingIOError as error:
        raise ConfigError(
            [f"{folder} is being written by another process: wait for it, or give another folder"]
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}: give a folder that can be written") from error
    try:
        _clear(temporary)
        free = shutil.disk_usage(temporary).free
        if needed_bytes > free:
            raise CheckpointError(
                f"{folder} needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB: "
                "make room, or write elsewhere"
            )
        yield temporary
        for below, _, _ in os.walk(temporary):
            _sync(Path(below))
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; nothing was kept: make room, or save elsewhere"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _clear(temporary: Path) -> None:
    """Clear away what a dead process left. Raises OSError."""
    for left in temporary.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
