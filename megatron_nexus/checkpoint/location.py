"""Locations: where checkpoints lie, a path on a disk or a name in an object store such as s3://bucket/run."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.extras import install_command

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEME = "://"


@cache
def file_system(protocol: str) -> "AbstractFileSystem":
    """Return the object store of a protocol. Raises ConfigError if its library is not installed."""
    import fsspec  # here: only object stores need it

    try:
        # What others write and delete is to be seen at once.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{protocol}{SCHEME} cannot be reached: {error}; for s3, {install_command('s3')}"
        ) from error


@cache
def _foreign_errors(protocol: str) -> tuple[type[Exception], ...]:
    """Return the errors of a store's library that are not OSErrors: no connection, no credentials."""
    if protocol != "s3":
        return ()
    from botocore.exceptions import BotoCoreError

    return (BotoCoreError,)


class ObjectPath:
    """A name in an object store, with those methods of a `Path` by which checkpoints are found and read.

    Folders are what names have in common up to a slash; they need not be made. Raises FileNotFoundError as a
    `Path` does, and for all else CheckpointError.
    """

    def __init__(self, url: str) -> None:
        self.protocol, _, key = url.partition(SCHEME)
        self.key = key.strip("/")

    def __str__(self) -> str:
        return f"{self.protocol}{SCHEME}{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last component."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "ObjectPath":
        """The folder that holds it; a bucket is its own parent."""
        return ObjectPath(f"{self.protocol}{SCHEME}{self.key.rpartition('/')[0] or self.key}")

    @property
    def store(self) -> "AbstractFileSystem":
        """The store that holds the object."""
        return file_system(self.protocol)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Make every error of the store a FileNotFoundError or a CheckpointError that names this object."""
        failures: tuple[type[Exception], ...] = (OSError, *_foreign_errors(self.protocol))
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
        except failures as error:
            raise CheckpointError(
                f"{self}: {error}: check that the store can be reached and its credentials allow it"
            ) from error

    def _ask(self, question: "Callable[[AbstractFileSystem], Any]") -> Any:
        with self.named_in_errors():
            return question(self.store)

    def resolve(self) -> "ObjectPath":
        """Return itself: there are no links."""
        return self

    def exists(self) -> bool:
        """Return whether it is an object or a folder."""
        return self._ask(lambda store: store.exists(self.key))

    def is_file(self) -> bool:
        """Return whether it is an object."""
        return self._ask(lambda store: store.isfile(self.key))

    def is_dir(self) -> bool:
        """Return whether an object lies in it."""
        return self._ask(lambda store: store.isdir(self.key))

    def is_symlink(self) -> bool:
        """Return False: an object store has no links."""
        return False

    def iterdir(self) -> "Iterator[ObjectPath]":
        """Yield what lies in it. Raises FileNotFoundError if nothing does."""
        for key in self._ask(lambda store: store.ls(self.key, detail=False)):
            if key.strip("/") != self.key:
                yield ObjectPath(f"{self.protocol}{SCHEME}{key}")

    def read_bytes(self) -> bytes:
        """Return all bytes of the object."""
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of the object."""
        return self._ask(lambda store: store.cat_file(self.key, start=start, end=stop))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the whole object, decoded."""
        return self.read_bytes().decode(encoding, errors)

    def write_text(self, text: str) -> None:
        """Create or replace the object in one request."""
        self._ask(lambda store: store.pipe_file(self.key, text.encode()))

    def unlink(self) -> None:
        """Delete the object."""
        self._ask(lambda store: store.rm_file(self.key))


Location: TypeAlias = Path | ObjectPath
Place = TypeVar("Place", Path, ObjectPath, Path | ObjectPath)


def location(text: str) -> Location:
    """Parse a path or a URL."""
    return ObjectPath(text) if SCHEME in text else Path(text)
