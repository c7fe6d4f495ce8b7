"""The reader that puts the logical tensors of a checkpoint together again, box by box.

Needs numpy and json only: no torch, no process group, no DeepSpeed.
"""

import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from megatron_nexus.checkpoint.chunks import BoxIndex, are_disjoint, full_box, index_within, intersect
from megatron_nexus.checkpoint.data_file import (
    BLOCK_BYTES,
    DTYPE,
    STATES,
    Array,
    Chunk,
    DataFileRecord,
    StoredChunk,
    header_random_states,
)
from megatron_nexus.checkpoint.format_2 import read_indices
from megatron_nexus.checkpoint.index import missing_file, raise_all, read_index
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.storage import Bytes, folder_of
from megatron_nexus.errors import CheckpointError, os_errors_as
from megatron_nexus.spec.shard import Box


class StateReader(ABC):
    """What training loads from: a checkpoint's tensors box by box, and what its manifest says of them."""

    folder: Location
    manifest: Manifest

    @abstractmethod
    def read_into(self, values: Array, tensor: str, state: str, box: Box) -> None:
        """Read a box into the caller's array.

        Raises CheckpointError: an element is not stored exactly once, or lies in a damaged block.
        """

    @abstractmethod
    def random_states(self, rank: int) -> dict[str, bytes]:
        """Return the states of a rank's random generators, by device."""

    def read_box(self, tensor: str, state: str, box: Box) -> Array:
        """Return the elements of a box, float32 of shape `box.sizes`; raises as `read_into` does."""
        values = np.empty(box.sizes, DTYPE)
        self.read_into(values, tensor, state, box)
        return values


class CheckpointReader(StateReader):
    """Reads boxes of logical tensors from the folder of a checkpoint, whatever topology wrote it.

    Opening reads the manifest and the index, and no data file. Reading checks the length and the header of
    each file of which it needs anything, the checksum of each block, and that each element is stored exactly
    once. Memory is needed for one chunk at a time. While a reader lives no run deletes its checkpoint.
    """

    def __init__(self, folder: Location) -> None:
        """Read the manifest and the index. Raises CheckpointError."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        with os_errors_as(CheckpointError, folder / MANIFEST_FILE, "load another"):
            weakref.finalize(self, folder_of(folder).lock_for_reading())
        self._index = (read_index if self.manifest.files else read_indices)(folder, self.manifest)
        self._checked_files: set[str] = set()
        self._checked: set[tuple[str, int]] = set()
        self._box_index: dict[tuple[str, str], BoxIndex] = {}
        self._stored: dict[tuple[str, str], list[tuple[DataFileRecord, StoredChunk]]] = {}
        for record in self._index.files:
            for stored in record.chunks:
                key = stored.chunk.tensor, stored.chunk.state
                self._stored.setdefault(key, []).append((record, stored))

    def _header(self, record: DataFileRecord) -> bytes:
        """Return a data file's header. Raises CheckpointError: it is damaged, or the file of another size."""
        folder, length = folder_of(self.folder), record.header_bytes
        problem = "its header is damaged"
        with self._checkpoint_errors(record):
            found = folder.size(record.name)
            if found != record.bytes:
                problem = f"has {found:,} bytes, its index says {record.bytes:,}"
            else:
                with folder.part(record.name, 0, length, 0, length) as contents:
                    header = contents.tobytes()
                if zlib.crc32(header) == record.header_crc32:
                    return header
        raise CheckpointError(
            f"{self.folder / record.name}: {problem}: copy it again, or load another checkpoint"
        )

    @contextmanager
    def _checkpoint_errors(self, record: DataFileRecord) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                missing_file(self.folder / record.name, error.strerror, self.manifest)
            ) from error

    def random_states(self, rank: int) -> dict[str, bytes]:
        if self._index.random_states is not None:
            return dict(self._index.random_states[rank])
        record = next(record for record in self._index.files if rank in record.ranks)
        is_named = self.manifest.format_version > 3
        return header_random_states(self._header(record), rank if is_named else None)

    @contextmanager
    def _checked_bytes(
        self, record: DataFileRecord, stored: StoredChunk, start: int, stop: int
    ) -> Iterator[Bytes]:
        """Map a chunk's bytes, of which those in [start, stop) are there and checked."""
        length = stored.chunk.box.numel * DTYPE.itemsize
        start = start // BLOCK_BYTES * BLOCK_BYTES
        stop = min(length, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        if record.name not in self._checked_files:
            self._header(record)
            self._checked_files.add(record.name)
        part = folder_of(self.folder).part(record.name, stored.start, length, start, stop)
        with self._checkpoint_errors(record), part as contents:
            self._check(record, stored, contents, start, stop)
            yield contents

    def _check(
        self, record: DataFileRecord, stored: StoredChunk, contents: Bytes, start: int, stop: int
    ) -> None:
        """Verify the blocks that hold the bytes [start, stop) of a chunk, once each."""
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            if (record.name, stored.start + first) in self._checked:
                continue
            if zlib.crc32(contents[first : first + BLOCK_BYTES].data) != stored.checksums[number]:
                raise CheckpointError(
                    f"{self.folder / record.name}: {_named(stored.chunk)} is damaged within a MiB of byte "
                    f"{stored.start + first:,} (its CRC-32 differs): copy the file again, or load another "
                    "checkpoint"
                )
            self._checked.add((record.name, stored.start + first))

    def read_into(self, values: Array, tensor: str, state: str, box: Box) -> None:
        for overlap, record, stored in self._overlaps(tensor, state, box):
            with self._checked_bytes(record, stored, *_extent(overlap, stored.chunk.box)) as contents:
                held = contents.view(DTYPE).reshape(stored.chunk.box.sizes)
                values[index_within(overlap, box)] = held[index_within(overlap, stored.chunk.box)]

    def _overlaps(self, tensor: str, state: str, box: Box) -> list[tuple[Box, DataFileRecord, StoredChunk]]:
        """Return the parts of stored chunks that make up a box, each element once."""
        key = tensor, state
        chunks = self._stored.get(key, [])
        if chunks and key not in self._box_index:
            self._box_index[key] = BoxIndex([stored.chunk.box for _, stored in chunks])
        overlaps = [
            (overlap, *chunks[number])
            for number in (self._box_index[key].overlapping(box) if chunks else ())
            if (overlap := intersect(chunks[number][1].chunk.box, box)) is not None
        ]
        covered = sum(overlap.numel for overlap, _, _ in overlaps)
        if covered != box.numel or not are_disjoint([overlap for overlap, _, _ in overlaps]):
            raise CheckpointError(
                f"{self.folder}: {_named(Chunk(tensor, state, box))} has {box.numel:,} elements, of which "
                f"{covered:,} are stored, counted with repetition; each must be stored exactly once: "
                "load another checkpoint"
            )
        return overlaps

    def require_tensors(self, needed: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError where the tensors are not those of the configuration, given by shape."""
        held = {name: spec.shape for name, spec in self.manifest.specs.items()}
        wrong = sorted(name for name in held.keys() | needed.keys() if held.get(name) != needed.get(name))
        if wrong:
            raise CheckpointError(
                f"{self.folder}: its tensors are not those of its configuration, {wrong[0]} first: it was "
                "written by another version; load it with that one"
            )

    @property
    def chunk_count(self) -> int:
        """How many chunks are stored, of all tensors and states."""
        return sum(map(len, self._stored.values()))

    def verify(self, advance: Callable[[int], None] = lambda _: None) -> NonFiniteValues:
        """Read everything and verify that it is undamaged and complete; calls `advance` with the bytes read.

        Returns how many values of each tensor are not finite, which is not damage of the files.

        Raises CheckpointError: one line for each damaged chunk and each tensor that is not stored exactly
        once.
        """
        problems = []
        non_finite = NonFiniteValues()
        for spec in self.manifest.specs.values():
            for state in STATES:
                try:
                    self._overlaps(spec.name, state, full_box(spec.shape))
                except CheckpointError as error:
                    problems.append(str(error))
        for record in self._index.files:
            try:
                self._header(record)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for stored in record.chunks:
                size = stored.chunk.box.numel * DTYPE.itemsize
                try:
                    with self._checked_bytes(record, stored, 0, size) as contents:
                        name = f"{stored.chunk.tensor} ({stored.chunk.state})"
                        non_finite.add(name, contents.view(DTYPE))
                except CheckpointError as error:
                    problems.append(str(error))
                advance(size)
        raise_all(problems)
        return non_finite


def _extent(overlap: Box, box: Box) -> tuple[int, int]:
    """Return the byte range of a chunk of `box` that contains all of `overlap`."""
    first = last = 0
    for offset, size, origin, length in zip(
        overlap.offsets, overlap.sizes, box.offsets, box.sizes, strict=True
    ):
        first = first * length + offset - origin
        last = last * length + offset - origin + size - 1
    return first * DTYPE.itemsize, (last + 1) * DTYPE.itemsize


def _named(chunk: Chunk) -> str:
    ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
    return f"{chunk.tensor}[{ranges}] ({chunk.state})"
