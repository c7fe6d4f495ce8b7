"""A checkpoint that several ranks write: it appears, complete and as the latest, or not at all.

    with new_checkpoint(root, step, ranks) as checkpoint:
        record = write_chunks(checkpoint.folder, ...)           each rank, its part of a data file
        checkpoint.finish(manifest, records)                    rank 0 has the records of all files

A save in the background takes the same steps without the block: `begin`, `agreed`, `publish`, `abandon`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Generic

from megatron_nexus.base.communicator import Ranks, raise_on_all_ranks
from megatron_nexus.base.durable import require_space
from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc
from megatron_nexus.checkpoint.data_file import DataFileRecord, joined
from megatron_nexus.checkpoint.index import record_to_json
from megatron_nexus.checkpoint.location import Place
from megatron_nexus.checkpoint.manifest import (
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    manifest_to_json,
)
from megatron_nexus.checkpoint.run_dir import checkpoint_name, newest_checkpoint, run_dir_lock
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.errors import CheckpointError

Check = Callable[[Manifest], Manifest]


class NewCheckpoint(Generic[Place]):
    """A checkpoint being written into `root`; collective calls but for `publish`, which rank 0 makes."""

    def __init__(
        self,
        root: Place,
        step: int,
        ranks: Ranks,
        remedy: str = "",
        describe: Callable[[OSError], str] = str,
    ) -> None:
        """`remedy` ends the message of an error; `describe` makes the text of an OSError."""
        self.root: Place = root
        self.ranks = ranks
        self.path: Place = root / checkpoint_name(step)
        self.folder: Place = root / folder_of(self.path).unfinished_name
        """Where the ranks write."""
        self._remedy = remedy
        self._describe = describe
        self._held = ExitStack()
        self._begun = False

    def agreed(self) -> AbstractContextManager[None]:
        """Run the block on every rank; if it fails on any, raise CheckpointError on all of them."""
        purpose = f"{self.path}: cannot save the checkpoint"
        return raise_on_all_ranks(self.ranks, purpose, self._remedy, self._describe)

    def begin(self, needed_bytes: int = 0, new_run: bool = False) -> None:
        """Remove what crashed saves left, and create the folder. Raises CheckpointError on every rank.

        Of a `new_run` the folder `root` must have no checkpoints, and is locked until `close`.
        """
        with self.agreed():
            if self.ranks.rank == 0:
                if new_run:
                    self._lock_new_run()
                self._begun = True
                folder_of(self.path).begin()
                if needed_bytes:
                    require_space(Path(str(self.root)), needed_bytes)

    def _lock_new_run(self) -> None:
        assert isinstance(self.root, Path), "a lock is a file"
        self._held.enter_context(run_dir_lock(self.root))
        newest = newest_checkpoint(self.root)
        if newest is not None:
            raise CheckpointError(
                f"--save {self.root} holds {newest.name}, and checkpoints are never overwritten: give "
                "another folder"
            )

    def on_first_rank(self, action: Callable[[], object]) -> None:
        """Run an action on rank 0 while the others wait. Raises CheckpointError on every rank."""
        with self.agreed():
            if self.ranks.rank == 0:
                action()

    def publish(
        self, manifest: Manifest, files: Sequence[DataFileRecord], check: Check | None = None
    ) -> None:
        """Write the index and the manifest, and make this the latest checkpoint; on rank 0 alone.

        `files` are the records of all ranks; those of one data file are joined.
        `check` may read the folder, and returns the manifest that is kept. Raises OSError, CheckpointError.
        """
        files = joined(files)
        index = dumps_with_crc({"files": list(map(record_to_json, files))})
        sizes = {record.name: record.bytes for record in files} | {INDEX_FILE: len(index.encode())}
        manifest = replace(manifest, files=sizes, format_version=FORMAT_VERSION)
        self._write(INDEX_FILE, index)
        self._write(MANIFEST_FILE, manifest_to_json(manifest))
        if check is not None:
            self._write(MANIFEST_FILE, manifest_to_json(check(manifest)))
        folder_of(self.path).publish()

    def _write(self, name: str, text: str) -> None:
        with folder_of(self.folder).create(name) as write:
            write(text.encode())

    def finish(self, manifest: Manifest, files: Sequence[DataFileRecord], check: Check | None = None) -> None:
        """Publish when all ranks have written. Raises CheckpointError on every rank."""
        self.on_first_rank(lambda: self.publish(manifest, files, check))

    def abandon(self) -> None:
        """Delete what was written, as far as possible; on rank 0."""
        if self._begun:
            folder_of(self.path).abandon()

    def close(self) -> None:
        """Release the lock of a new run."""
        self._held.close()


@contextmanager
def new_checkpoint(
    root: Place,
    step: int,
    ranks: Ranks,
    needed_bytes: int = 0,
    new_run: bool = False,
    describe: Callable[[OSError], str] = str,
) -> Iterator[NewCheckpoint[Place]]:
    """Yield a checkpoint to write and `finish`; without that, or with an error, nothing of it is left.

    Raises CheckpointError on every rank if one fails; see `NewCheckpoint.begin` for the arguments.
    """
    checkpoint = NewCheckpoint(root, step, ranks, describe=describe)
    try:
        checkpoint.begin(needed_bytes, new_run)
        yield checkpoint
    except BaseException:
        checkpoint.abandon()
        raise
    finally:
        checkpoint.close()
