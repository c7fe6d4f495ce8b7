"""The store: one rank's chunks on disk, and the reader that puts logical tensors together again.

    rank_00000.safetensors   float32 chunks, one after the other; any safetensors library opens it
    rank_00000.json          what each chunk is: tensor, state, global offsets, sizes, first byte, and the
                             CRC-32 of each MiB of it; sealed

Needs numpy and json only: no torch, no process group, no DeepSpeed.
"""

import base64
import json
import os
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import WRITE_BYTES
from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc, loads_with_crc
from megatron_nexus.checkpoint.chunks import BoxIndex, are_disjoint, full_box, index_within, intersect
from megatron_nexus.checkpoint.location import Location, Place
from megatron_nexus.checkpoint.manifest import Manifest, read_manifest
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.storage import Bytes, DataFile, folder_of
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.shard import Box

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: the master weights and Adam's two moments."""

BLOCK_BYTES = 1 << 20
"""Bytes of a chunk that have one checksum: what must be read, at most, to check a single element."""

LISTED_PROBLEMS = 10

Array = npt.NDArray[np.float32]
DTYPE = np.dtype("<f4")


@dataclass(frozen=True)
class Chunk:
    """A box of one state of a logical tensor."""

    tensor: str
    state: str
    box: Box


@dataclass(frozen=True)
class StoredChunk:
    """A chunk in a file: where its bytes begin, and the CRC-32 of each of its blocks."""

    chunk: Chunk
    path: Location
    start: int
    checksums: tuple[int, ...]


def rank_files(folder: Place, rank: int) -> tuple[Place, Place]:
    """Return the data file and the index file of a rank."""
    return folder / f"rank_{rank:05d}.safetensors", folder / f"rank_{rank:05d}.json"


def write_durably(path: Location, text: str) -> None:
    """Write a text file that survives a power cut once this returns. Raises OSError that names it."""
    with folder_of(path.parent).create(path.name) as write:
        write(text.encode())


def write_chunks(
    folder: Location,
    rank: int,
    chunks: Sequence[Chunk],
    arrays: Iterable[Array],
    random_states: Mapping[str, bytes],
) -> None:
    """Write the two files of a rank, durably. `arrays` are the chunks' values, asked for one at a time.

    Raises OSError, which names the file.
    """
    checksums = []
    # The checksum of a chunk is computed while the chunk is written: both run without the GIL.
    with folder_of(folder).create(rank_files(folder, rank)[0].name) as write, ThreadPoolExecutor(1) as beside:
        write(safetensors_header(chunks))
        for chunk, array in zip(chunks, arrays, strict=True):
            assert array.shape == chunk.box.sizes, f"{chunk}: values of shape {array.shape}"
            contents = np.ascontiguousarray(array, dtype=DTYPE).reshape(-1).view(np.uint8).data
            checksum = beside.submit(block_checksums, contents)
            write(contents)
            checksums.append(checksum.result())
    write_index(folder, rank, chunks, checksums, random_states)


def block_checksums(contents: memoryview) -> tuple[int, ...]:
    """Return the CRC-32 of each block of a chunk's bytes."""
    return tuple(
        zlib.crc32(contents[start : start + BLOCK_BYTES]) for start in range(0, len(contents), BLOCK_BYTES)
    )


def write_at(descriptor: int, contents: memoryview, start: int) -> None:
    """Write bytes at an offset of a file. Raises OSError."""
    done = 0
    while done < len(contents):
        done += os.pwrite(descriptor, contents[done : done + WRITE_BYTES], start + done)


def chunk_starts(chunks: Sequence[Chunk]) -> list[int]:
    """Return the first byte of each chunk in the data file, and the file's length."""
    starts = [len(safetensors_header(chunks))]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.box.numel * DTYPE.itemsize)
    return starts


def write_index(
    folder: Location,
    rank: int,
    chunks: Sequence[Chunk],
    checksums: Sequence[Sequence[int]],
    random_states: Mapping[str, bytes],
) -> None:
    """Write the index file of a rank, durably. Raises OSError."""
    *starts, length = chunk_starts(chunks)
    entries = [
        {
            "tensor": chunk.tensor,
            "state": chunk.state,
            "offsets": chunk.box.offsets,
            "sizes": chunk.box.sizes,
            "start": start,
            "crc32": of_blocks,
        }
        for chunk, start, of_blocks in zip(chunks, starts, checksums, strict=True)
    ]
    random = {name: base64.b64encode(state).decode() for name, state in random_states.items()}
    index = {"rank": rank, "bytes": length, "random_states": random, "entries": entries}
    write_durably(rank_files(folder, rank)[1], dumps_with_crc(index))


def safetensors_header(chunks: Sequence[Chunk]) -> bytes:
    """Return the header of a safetensors file, its length included, padded so that data is aligned."""
    header: dict[str, dict[str, object]] = {}
    numbers: Counter[str] = Counter()
    end = 0
    for chunk in chunks:
        name = f"{chunk.tensor}|{chunk.state}"
        begin, end = end, end + chunk.box.numel * DTYPE.itemsize
        header[f"{name}|{numbers[name]}"] = {
            "dtype": "F32",
            "shape": chunk.box.sizes,
            "data_offsets": (begin, end),
        }
        numbers[name] += 1
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class StateReader(Protocol):
    """What training loads from: a checkpoint's tensors box by box, and what its manifest says of them."""

    folder: Location
    manifest: Manifest

    def read_box(self, tensor: str, state: str, box: Box) -> Array:
        """Return the elements of a box, float32 of shape `box.sizes`."""
        ...

    def random_states(self, rank: int) -> dict[str, bytes]:
        """Return the states of a rank's random generators, by device."""
        ...


class CheckpointReader:
    """Reads boxes of logical tensors from the folder of a checkpoint, whatever topology wrote it.

    Opening checks manifest, indices and headers, and that all files are there and as long as they should be;
    reading checks that each element is stored exactly once, and the checksum of each block of which anything
    is read. Memory is needed for one chunk at a time. While a reader lives no run deletes its checkpoint.
    """

    def __init__(self, folder: Location) -> None:
        """Read the manifest and the indices. Raises CheckpointError."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        try:
            weakref.finalize(self, folder_of(folder).lock_for_reading())
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder}: {error.strerror}: load another") from error
        self._checked: set[tuple[Location, int]] = set()
        self._stored: dict[tuple[str, str], list[StoredChunk]] = {}
        self._box_index: dict[tuple[str, str], BoxIndex] = {}
        self._random_states: list[dict[str, str]] = []
        self._files: dict[Location, DataFile] = {}
        problems = []
        for rank in range(self.manifest.topology.world_size):
            try:
                self._read_index(rank)
            except CheckpointError as error:
                problems.append(str(error))
        _raise_all(problems)

    def _read_index(self, rank: int) -> None:
        data_path, index_path = rank_files(self.folder, rank)
        chunks = []
        try:
            raw = loads_with_crc(index_path.read_bytes())
            for entry in raw["entries"]:
                box = Box(tuple(entry["offsets"]), tuple(entry["sizes"]))
                chunks.append(Chunk(entry["tensor"], entry["state"], box))
                stored = StoredChunk(chunks[-1], data_path, entry["start"], tuple(entry["crc32"]))
                self._stored.setdefault((chunks[-1].tensor, chunks[-1].state), []).append(stored)
            self._random_states.append(raw["random_states"])
            expected_bytes, header = int(raw["bytes"]), safetensors_header(chunks)
            file = self._files[data_path] = folder_of(self.folder).open(data_path.name)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: {error.strerror}; the checkpoint was written by "
                f"{self.manifest.topology.world_size} ranks and needs the files of each: "
                "copy the missing ones, or load another checkpoint"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{index_path}: damaged ({type(error).__name__}: {error}): "
                "copy it again, or load another checkpoint"
            ) from error
        if file.size != expected_bytes:
            raise CheckpointError(
                f"{data_path}: has {file.size:,} bytes, its index says {expected_bytes:,}: "
                "copy it again, or load another checkpoint"
            )
        try:
            with file.part(0, len(header), 0, len(header)) as found_header:
                is_sound = found_header.tobytes() == header
        except OSError as error:
            raise CheckpointError(f"{data_path}: {error.strerror}: load another checkpoint") from error
        if not is_sound:
            raise CheckpointError(
                f"{data_path}: its header is damaged: copy it again, or load another checkpoint"
            )

    def random_states(self, rank: int) -> dict[str, bytes]:
        """Return the states of a rank's random generators, by device."""
        return {name: base64.b64decode(state) for name, state in self._random_states[rank].items()}

    @contextmanager
    def _checked_bytes(self, stored: StoredChunk, start: int, stop: int) -> Iterator[Bytes]:
        """A chunk's bytes, of which those in [start, stop) are there and checked."""
        length = stored.chunk.box.numel * DTYPE.itemsize
        start = start // BLOCK_BYTES * BLOCK_BYTES
        stop = min(length, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
        try:
            with self._files[stored.path].part(stored.start, length, start, stop) as contents:
                self._check(stored, contents, start, stop)
                yield contents
        except OSError as error:
            raise CheckpointError(f"{stored.path}: {error.strerror}: load another checkpoint") from error

    def _check(self, stored: StoredChunk, contents: Bytes, start: int, stop: int) -> None:
        """Verify the blocks that hold the bytes [start, stop) of a chunk, once each."""
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            if (stored.path, stored.start + first) in self._checked:
                continue
            if zlib.crc32(contents[first : first + BLOCK_BYTES].data) != stored.checksums[number]:
                raise CheckpointError(
                    f"{stored.path}: {_named(stored.chunk)} is damaged within a MiB of byte "
                    f"{stored.start + first:,} (its CRC-32 differs): copy the file again, or load another "
                    "checkpoint"
                )
            self._checked.add((stored.path, stored.start + first))

    def read_box(self, tensor: str, state: str, box: Box) -> Array:
        """Return the elements of a box, float32 of shape `box.sizes`.

        Raises:
            CheckpointError: an element is not stored, or twice, or lies in a damaged block.
        """
        values = np.empty(box.sizes, DTYPE)
        self.read_into(values, tensor, state, box)
        return values

    def read_into(self, values: Array, tensor: str, state: str, box: Box) -> None:
        """Read a box into the caller's array; raises as `read_box` does."""
        for overlap, stored in self._overlaps(tensor, state, box):
            with self._checked_bytes(stored, *_extent(overlap, stored.chunk.box)) as contents:
                held = contents.view(DTYPE).reshape(stored.chunk.box.sizes)
                values[index_within(overlap, box)] = held[index_within(overlap, stored.chunk.box)]

    def _overlaps(self, tensor: str, state: str, box: Box) -> list[tuple[Box, StoredChunk]]:
        """Return the parts of stored chunks that make up a box, each element once."""
        key = tensor, state
        chunks = self._stored.get(key, [])
        if chunks and key not in self._box_index:
            self._box_index[key] = BoxIndex([stored.chunk.box for stored in chunks])
        overlaps = [
            (overlap, chunks[number])
            for number in (self._box_index[key].overlapping(box) if chunks else ())
            if (overlap := intersect(chunks[number].chunk.box, box)) is not None
        ]
        covered = sum(overlap.numel for overlap, _ in overlaps)
        if covered != box.numel or not are_disjoint([overlap for overlap, _ in overlaps]):
            raise CheckpointError(
                f"{self.folder}: {_named(Chunk(tensor, state, box))} has {box.numel:,} elements, of which "
                f"{covered:,} are stored, counted with repetition; each must be stored exactly once: "
                "load another checkpoint"
            )
        return overlaps

    @property
    def file_sizes(self) -> dict[str, int]:
        """The files of the checkpoint by name, with their bytes."""
        return folder_of(self.folder).sizes()

    @property
    def chunk_count(self) -> int:
        """How many chunks are stored, of all tensors and states."""
        return sum(map(len, self._stored.values()))

    def verify(self, advance: Callable[[int], None] = lambda _: None) -> NonFiniteValues:
        """Read everything and verify that it is undamaged and complete; calls `advance` with the bytes read.

        Returns how many values of each tensor are not finite, which is not damage of the files.

        Raises:
            CheckpointError: one line for each damaged chunk and each tensor that is not stored exactly once.
        """
        problems = []
        non_finite = NonFiniteValues()
        for spec in self.manifest.specs.values():
            for state in STATES:
                try:
                    self._overlaps(spec.name, state, full_box(spec.shape))
                except CheckpointError as error:
                    problems.append(str(error))
        for chunks in self._stored.values():
            for stored in chunks:
                try:
                    with self._checked_bytes(stored, 0, stored.chunk.box.numel * DTYPE.itemsize) as contents:
                        name = f"{stored.chunk.tensor} ({stored.chunk.state})"
                        non_finite.add(name, contents.view(DTYPE))
                except CheckpointError as error:
                    problems.append(str(error))
                advance(stored.chunk.box.numel * DTYPE.itemsize)
        _raise_all(problems)
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


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        left_out = len(problems) - LISTED_PROBLEMS
        more = [f"and {left_out} more"] if left_out > 0 else []
        raise CheckpointError("\n".join([*problems[:LISTED_PROBLEMS], *more]))


def _named(chunk: Chunk) -> str:
    ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
    return f"{chunk.tensor}[{ranges}] ({chunk.state})"
