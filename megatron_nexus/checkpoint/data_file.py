"""The data file of a rank, or of several that share it: float32 chunks; any safetensors library opens it.

    rank_00000.safetensors          header: name, shape and place of each chunk; as metadata random states
    ranks_00000-00007.safetensors   then the chunks' values, row-major, those of one rank together

Ranks that share a file know of each other's chunks beforehand: so each knows the header and where its own
begin, and writes them without waiting. Needs numpy and json only: no torch, no process group.
"""

import base64
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import WRITE_BYTES
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.spec.shard import Box

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: the master weights and Adam's two moments."""

BLOCK_BYTES = 1 << 20
"""Bytes of a chunk that have one checksum: what must be read, at most, to check a single element."""

Array = npt.NDArray[np.float32]
DTYPE = np.dtype("<f4")
RANDOM_STATE = "random_state."


@dataclass(frozen=True)
class Chunk:
    """A box of one state of a logical tensor."""

    tensor: str
    state: str
    box: Box


@dataclass(frozen=True)
class StoredChunk:
    """A chunk in a data file: its first byte, and the CRC-32 of each of its blocks."""

    chunk: Chunk
    start: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class DataFileRecord:
    """What the index says of a data file, and of the chunks that some or all of its ranks have there."""

    name: str
    bytes: int
    header_bytes: int
    header_crc32: int
    ranks: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class FilePart:
    """What one rank puts into a data file: chunks, and its random states by device."""

    rank: int
    chunks: Sequence[Chunk]
    random_states: Mapping[str, bytes] = field(default_factory=dict)


def parts_of_one_file(parts: Sequence[FilePart], rank: int, files: int) -> list[FilePart]:
    """Return the parts that are in one file with that of `rank`, of `files` files, or one for each part."""
    files = min(files, len(parts))
    file_of = {part.rank: number * files // len(parts) for number, part in enumerate(parts)}
    return [part for part in parts if file_of[part.rank] == file_of[rank]]


def data_file_name(ranks: Sequence[int]) -> str:
    """Return the name of the data file of these ranks, ascending. No rank is in two files."""
    if len(ranks) == 1:
        return f"rank_{ranks[0]:05d}.safetensors"
    return f"ranks_{ranks[0]:05d}-{ranks[-1]:05d}.safetensors"


def write_chunks(
    folder: Location, parts: Sequence[FilePart], arrays: Iterable[Array], own: int = 0
) -> DataFileRecord:
    """Write part `own` of a data file that consists of `parts`, durably, and return its record for the index.

    `arrays` are the values of that part's chunks, asked for one at a time. Each part is written by one rank,
    the first with the header, in any order and at once. Raises OSError, which names the file.
    """
    ranks = [part.rank for part in parts]
    chunks = [chunk for part in parts for chunk in part.chunks]
    states = {f"{part.rank}.{name}": s for part in parts for name, s in part.random_states.items()}
    header = safetensors_header(chunks, states)
    first = sum(len(part.chunks) for part in parts[:own])
    start = chunk_starts(header, chunks)[first] if own else 0
    checksums = []
    # The checksum of a chunk is computed while the chunk is written: both run without the GIL.
    with (
        folder_of(folder).create(data_file_name(ranks), start if len(parts) > 1 else None) as write,
        ThreadPoolExecutor(1) as background,
    ):
        if own == 0:
            write(header)
        for chunk, array in zip(parts[own].chunks, arrays, strict=True):
            assert array.shape == chunk.box.sizes, f"{chunk}: values of shape {array.shape}"
            contents = np.ascontiguousarray(array, dtype=DTYPE).reshape(-1).view(np.uint8).data
            checksum = background.submit(block_checksums, contents)
            write(contents)
            checksums.append(checksum.result())
    return data_file_record(ranks, header, chunks, checksums, first)


def data_file_record(
    ranks: Sequence[int],
    header: bytes,
    chunks: Sequence[Chunk],
    checksums: Sequence[tuple[int, ...]],
    first: int = 0,
) -> DataFileRecord:
    """Return the record of the data file of `ranks` with this header and these chunks.

    It names those chunks of which the checksums are given, from number `first` on.
    """
    *starts, length = chunk_starts(header, chunks)
    stored = tuple(map(StoredChunk, chunks[first:], starts[first:], checksums))
    return DataFileRecord(
        data_file_name(ranks), length, len(header), zlib.crc32(header), tuple(ranks), stored
    )


def joined(records: Iterable[DataFileRecord]) -> list[DataFileRecord]:
    """Return one record for each data file, of those that its ranks returned."""
    files: dict[str, DataFileRecord] = {}
    for record in records:
        held = files.setdefault(record.name, replace(record, chunks=()))
        assert held.header_crc32 == record.header_crc32, f"the ranks of {record.name} do not agree on it"
        files[record.name] = replace(held, chunks=held.chunks + record.chunks)
    return list(files.values())


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


def chunk_starts(header: bytes, chunks: Sequence[Chunk]) -> list[int]:
    """Return the first byte of each chunk in the data file, and the file's length."""
    starts = [len(header)]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.box.numel * DTYPE.itemsize)
    return starts


def safetensors_header(chunks: Sequence[Chunk], random_states: Mapping[str, bytes] | None = None) -> bytes:
    """Return the header of a data file.

    `random_states` are named by rank and device, as in 0.cpu.
    """
    metadata = {
        f"{RANDOM_STATE}{name}": base64.b64encode(state).decode()
        for name, state in (random_states or {}).items()
    }
    numbers: Counter[str] = Counter()
    tensors = []
    for chunk in chunks:
        name = f"{chunk.tensor}|{chunk.state}"
        tensors.append((f"{name}|{numbers[name]}", "F32", chunk.box.sizes, chunk.box.numel * DTYPE.itemsize))
        numbers[name] += 1
    return header_of(tensors, metadata)


def header_of(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file for tensors: names, dtypes, shapes and bytes.

    It has its length in front and is padded, so that data starts aligned.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape, size in tensors:
        begin, end = end, end + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_random_states(header: bytes, rank: int | None) -> dict[str, bytes]:
    """Return the random states of a rank, by device, from the header of its data file.

    None: of the only rank, of which format version 3 did not give the number.
    """
    prefix = RANDOM_STATE if rank is None else f"{RANDOM_STATE}{rank}."
    metadata = parse_json(header[8:]).get("__metadata__", {})
    return {
        name.removeprefix(prefix): base64.b64decode(text)
        for name, text in metadata.items()
        if name.startswith(prefix)
    }
