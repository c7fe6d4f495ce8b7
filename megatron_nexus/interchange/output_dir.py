"""The folder that a conversion writes: it appears when it is complete, and nothing is ever overwritten."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_nexus.base.durable import atomic_dir, require_space
from megatron_nexus.errors import CheckpointError, ConfigError


def check_is_new(folder: Path) -> None:
    """Raise ConfigError if a folder cannot be created because something is there."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        held = "is a file" if not folder.is_dir() else "holds files"
        raise ConfigError(f"{folder} {held}, and nothing is ever overwritten: give another folder")


@contextmanager
def output_dir(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a folder to write in, which becomes `folder` when the block ends without an error.

    Raises:
        ConfigError: as `check_is_new`, or another process writes it.
        CheckpointError: it cannot be written, or does not fit on the disk.
    """
    check_is_new(folder)
    begun = False
    try:
        with atomic_dir(folder) as draft:
            begun = True
            require_space(draft, needed_bytes)
            yield draft
    except BlockingIOError as error:
        raise ConfigError(
            f"{folder} is being written by another process: wait for it, or give another folder"
        ) from error
    except OSError as error:
        if not begun:
            raise CheckpointError(f"{folder}: {error.strerror}: give a folder that can be written") from error
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; nothing was kept: make room, or save elsewhere"
        ) from error
