"""Storage: how checkpoints are written, made known and deleted where they lie.

    LocalFolder    has another name until it is complete, then it is renamed; what is written is durable
    ObjectFolder   is a checkpoint by its manifest, which is written last and deleted first

Names of checkpoints, and which one is the latest: see run_dir.
"""

import mmap
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import (
    DRAFT,
    Write,
    atomic_file,
    durable_file,
    exclusive_lock,
    fsync,
    shared_lock,
)
from megatron_nexus.checkpoint.location import Location, ObjectPath
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE
from megatron_nexus.errors import CheckpointError

LATEST_FILE = "latest"
CHECKPOINT = "iter_"
UPLOAD_BYTES = 16 << 20
"""Bytes of a part of an upload, held in memory."""

Bytes = npt.NDArray[np.uint8]


class LocalFolder:
    """A folder on a disk that all ranks share: a checkpoint's, or the run's.

    SAVE/.tmp_iter_0000200/      a save under way, or one that died
    SAVE/.old_iter_0000100/      a checkpoint while another one of the same step takes its place
    SAVE/.deleted_iter_0000050/  a checkpoint being deleted, which no reader opens

    A reader of a checkpoint holds a shared lock on its manifest. On NFS it may reach this machine only.
    All methods raise OSError or CheckpointError.
    """

    temporary, replaced, deleted = DRAFT, ".old_", ".deleted_"
    has_shared_files = True
    """Whether several ranks can write one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def unfinished_name(self) -> str:
        """The temporary name, in the same folder, of the checkpoint that becomes this one."""
        return f"{self.temporary}{self.path.name}"

    @property
    def _unfinished(self) -> Path:
        return self.path.with_name(self.unfinished_name)

    def begin(self) -> None:
        """Remove what crashed saves left next to this checkpoint, and create a folder for it."""
        root = self.path.parent
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.glob(f"{self.replaced}{CHECKPOINT}*"):
            original = root / folder.name.removeprefix(self.replaced)
            if original.exists():
                shutil.rmtree(folder)
            else:  # the save died between its two renames
                folder.rename(original)
        for folder in root.glob(f"{self.temporary}{CHECKPOINT}*"):
            shutil.rmtree(folder)
        self._unfinished.mkdir()

    def publish(self) -> None:
        """Replace a checkpoint of the same step, which may be of another run in the same folder.

        It is set aside first and deleted last, and is found there should this process die in between.
        """
        root, written = self.path.parent, self._unfinished
        aside = root / f"{self.replaced}{self.path.name}"
        fsync(written)
        if self.path.exists():
            self.path.rename(aside)
        written.rename(self.path)
        fsync(root)
        with atomic_file(root / LATEST_FILE) as write:
            write(f"{self.path.name}\n".encode())
        if aside.exists():
            shutil.rmtree(aside)

    def abandon(self) -> None:
        """Delete what a failed save has written, as far as possible."""
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def delete(self) -> bool:
        """Delete a checkpoint unless it is being read; a partial one never counts as a checkpoint."""
        try:
            with exclusive_lock(self.path / MANIFEST_FILE, create=False):
                dying = self.path.rename(self.path.with_name(f"{self.deleted}{self.path.name}"))
                fsync(self.path.parent)
        except BlockingIOError:
            return False
        shutil.rmtree(dying)
        return True

    def clear_deleted(self) -> None:
        """Finish the deletions in a run's folder that a crash interrupted."""
        for dead in self.path.glob(f"{self.deleted}{CHECKPOINT}*"):
            shutil.rmtree(dead)

    def lock_for_reading(self) -> Callable[[], None]:
        """Keep a checkpoint from being deleted; call the result to release it."""
        return shared_lock(self.path / MANIFEST_FILE)

    def create(self, name: str, start: int | None = None) -> AbstractContextManager[Write]:
        """Open a new file for writing; what is written is durable when the context exits.

        From start to end; or, of a file that several ranks write at once, from byte `start` on.
        """
        return durable_file(self.path / name, start)

    @contextmanager
    def part(self, name: str, first: int, length: int, start: int, stop: int) -> Iterator[Bytes]:
        """Map the part, which is read as it is used.

        Neither a descriptor nor memory is kept: a checkpoint has as many files as ranks wrote it.
        """
        before = first % mmap.ALLOCATIONGRANULARITY
        with (self.path / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_READ, offset=first - before)
        yield np.frombuffer(mapped, np.uint8, length, before)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return (self.path / name).stat().st_size

    def sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes, by name; empty if the folder does not exist."""
        if not self.path.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in self.path.iterdir() if path.is_file()}


class ObjectFolder:
    """The same in an object store, which knows neither renaming nor locks: readers are not waited for."""

    has_shared_files = False

    def __init__(self, path: ObjectPath) -> None:
        self.path = path

    @property
    def unfinished_name(self) -> str:
        return self.path.name

    def begin(self) -> None:
        for folder in _checkpoints(self.path.parent):
            if folder.path == self.path or MANIFEST_FILE not in folder.sizes():
                folder.delete()

    def publish(self) -> None:
        (self.path.parent / LATEST_FILE).write_text(f"{self.path.name}\n")

    def abandon(self) -> None:
        with suppress(OSError, CheckpointError):
            self.delete()

    def delete(self) -> bool:
        for name in sorted(self.sizes(), key=lambda name: name != MANIFEST_FILE):
            (self.path / name).unlink()
        return True

    def clear_deleted(self) -> None:
        for folder in _checkpoints(self.path):
            if MANIFEST_FILE not in folder.sizes():
                folder.delete()

    def lock_for_reading(self) -> Callable[[], None]:
        return lambda: None

    @contextmanager
    def create(self, name: str, start: int | None = None) -> Iterator[Write]:
        assert start is None, "an object has one writer"
        path = self.path / name
        with path.named_in_errors(), path.store.open(path.key, "wb", block_size=UPLOAD_BYTES) as file:

            def write(contents: bytes | memoryview) -> None:
                view = memoryview(contents)
                for start in range(0, len(view), UPLOAD_BYTES):
                    file.write(view[start : start + UPLOAD_BYTES])

            yield write

    @contextmanager
    def part(self, name: str, first: int, length: int, start: int, stop: int) -> Iterator[Bytes]:
        contents = np.empty(length, np.uint8)  # memory is taken where it is filled
        fetched = (self.path / name).read_range(first + start, first + stop)
        if len(fetched) != stop - start:
            raise OSError(0, f"{stop - start:,} bytes asked for, {len(fetched):,} received", name)
        contents[start:stop] = np.frombuffer(fetched, np.uint8)
        yield contents

    def size(self, name: str) -> int:
        path = self.path / name
        with path.named_in_errors():
            return int(path.store.size(path.key))

    def sizes(self) -> dict[str, int]:
        try:
            with self.path.named_in_errors():
                found = self.path.store.ls(self.path.key, detail=True)
        except FileNotFoundError:
            return {}
        entries = {entry["name"].rpartition("/")[2]: entry for entry in found if entry["type"] == "file"}
        return {name: int(entry["size"]) for name, entry in entries.items() if name}


def _checkpoints(root: ObjectPath) -> list[ObjectFolder]:
    try:
        return [ObjectFolder(path) for path in root.iterdir() if path.name.startswith(CHECKPOINT)]
    except FileNotFoundError:
        return []


def folder_of(location: Location) -> LocalFolder | ObjectFolder:
    """Return the folder at a location."""
    return ObjectFolder(location) if isinstance(location, ObjectPath) else LocalFolder(location)
