"""The data file of a rank: float32 chunks, one after the other; any safetensors library opens it.

    rank_00000.safetensors   header: name, shape and place of each chunk; as metadata the rank's random states
                             then the chunks' values, row-major

Needs numpy and json only: no torch, no process group.
"""

import base64
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
    """What the index says of a data file."""

    name: str
    bytes: int
    header_bytes: int
    header_crc32: int
    chunks: tuple[StoredChunk, ...]


def data_file_name(rank: int) -> str:
    """Return the name of a rank's data file."""
    return f"rank_{rank:05d}.safetensors"


def write_chunks(
    folder: Location,
    rank: int,
    chunks: Sequence[Chunk],
    arrays: Iterable[Array],
    random_states: Mapping[str, bytes],
) -> DataFileRecord:
    """Write the data file of a rank, durably, and return its record for the index.

    `arrays` are the chunks' values, asked for one at a time. Raises OSError, which names the file.
    """
    header = safetensors_header(chunks, random_states)
    checksums = []
    # The checksum of a chunk is computed while the chunk is written: both run without the GIL.
    with folder_of(folder).create(data_file_name(rank)) as write, ThreadPoolExecutor(1) as background:
        write(header)
        for chunk, array in zip(chunks, arrays, strict=True):
            assert array.shape == chunk.box.sizes, f"{chunk}: values of shape {array.shape}"
            contents = np.ascontiguousarray(array, dtype=DTYPE).reshape(-1).view(np.uint8).data
            checksum = background.submit(block_checksums, contents)
            write(contents)
            checksums.append(checksum.result())
    return data_file_record(rank, header, chunks, checksums)


def data_file_record(
    rank: int, header: bytes, chunks: Sequence[Chunk], checksums: Sequence[tuple[int, ...]]
) -> DataFileRecord:
    """Return the record of a data file with this header and these chunks, each with its checksums."""
    *starts, length = chunk_starts(header, chunks)
    stored = tuple(map(StoredChunk, chunks, starts, checksums))
    return DataFileRecord(data_file_name(rank), length, len(header), zlib.crc32(header), stored)


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
    """Return the header of a data file, its length included, padded so that data is aligned."""
    header: dict[str, dict[str, object]] = {}
    if random_states:
        header["__metadata__"] = {
            f"{RANDOM_STATE}{name}": base64.b64encode(state).decode() for name, state in random_states.items()
        }
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


def header_random_states(header: bytes) -> dict[str, bytes]:
    """Return the random states of a rank, by device, from the header of its data file."""
    metadata = parse_json(header[8:]).get("__metadata__", {})
    return {
        name.removeprefix(RANDOM_STATE): base64.b64decode(text)
        for name, text in metadata.items()
        if name.startswith(RANDOM_STATE)
    }
