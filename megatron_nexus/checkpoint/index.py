"""The index of a checkpoint: which chunk of which tensor lies where, with the CRC-32 of each block of it.

    index.json   for each data file: its name, the length and CRC-32 of its header, and its chunks

Rank 0 writes it, so that a reader opens one index, however many ranks have written.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_nexus.checkpoint.checksummed_json import loads_with_crc
from megatron_nexus.checkpoint.data_file import Chunk, DataFileRecord, FilePart, StoredChunk
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import INDEX_FILE, Manifest
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.shard import Box

LISTED_PROBLEMS = 10


@dataclass(frozen=True)
class Index:
    """The data files of a checkpoint; the random states of its ranks where the index itself holds them."""

    files: Sequence[DataFileRecord]
    random_states: Sequence[Mapping[str, bytes]] | None = None


def record_to_json(record: DataFileRecord) -> dict[str, Any]:
    """Return the record of a data file as JSON; `record_from_json` reads it back."""
    return {
        "name": record.name,
        "bytes": record.bytes,
        "header": [record.header_bytes, record.header_crc32],
        "ranks": record.ranks,
        "entries": [
            {
                "tensor": stored.chunk.tensor,
                "state": stored.chunk.state,
                "offsets": stored.chunk.box.offsets,
                "sizes": stored.chunk.box.sizes,
                "start": stored.start,
                "crc32": stored.checksums,
            }
            for stored in record.chunks
        ],
    }


def record_from_json(raw: Mapping[str, Any]) -> DataFileRecord:
    """Return the record in parsed JSON. Raises KeyError, TypeError or ValueError if it is not one."""
    header_bytes, header_crc32 = raw["header"]
    chunks = tuple(stored_from_json(entry) for entry in raw["entries"])
    ranks = tuple(raw["ranks"])
    return DataFileRecord(raw["name"], raw["bytes"], header_bytes, header_crc32, ranks, chunks)


def stored_from_json(entry: Mapping[str, Any]) -> StoredChunk:
    """Return the chunk of an entry. Raises KeyError or TypeError if it is not one."""
    box = Box(tuple(entry["offsets"]), tuple(entry["sizes"]))
    return StoredChunk(Chunk(entry["tensor"], entry["state"], box), entry["start"], tuple(entry["crc32"]))


def part_to_json(part: FilePart) -> dict[str, Any]:
    """Return a rank's part of a data file as JSON; `part_from_json` reads it back."""
    return {
        "rank": part.rank,
        "chunks": [(c.tensor, c.state, c.box.offsets, c.box.sizes) for c in part.chunks],
        "random_states": {name: base64.b64encode(s).decode() for name, s in part.random_states.items()},
    }


def part_from_json(raw: Mapping[str, Any]) -> FilePart:
    """Return the part that `part_to_json` was given."""
    chunks = [
        Chunk(tensor, state, Box(tuple(offsets), tuple(sizes)))
        for tensor, state, offsets, sizes in raw["chunks"]
    ]
    states = {name: base64.b64decode(text) for name, text in raw["random_states"].items()}
    return FilePart(raw["rank"], chunks, states)


def read_index(folder: Location, manifest: Manifest) -> Index:
    """Read the index file of a checkpoint. Raises CheckpointError if it is missing or damaged."""
    files = read_checked(folder / INDEX_FILE, manifest)["files"]
    # In format version 3 each rank had a file.
    return Index([record_from_json({"ranks": [rank], **raw}) for rank, raw in enumerate(files)])


def raise_all(problems: Sequence[str]) -> None:
    """Raise one CheckpointError that lists the problems, if there are any."""
    if problems:
        left_out = len(problems) - LISTED_PROBLEMS
        more = [f"and {left_out} more"] if left_out > 0 else []
        raise CheckpointError("\n".join([*problems[:LISTED_PROBLEMS], *more]))


def read_checked(path: Location, manifest: Manifest) -> dict[str, Any]:
    """Read a JSON file with its checksum. Raises CheckpointError if it is missing or damaged."""
    try:
        return loads_with_crc(path.read_bytes())
    except OSError as error:
        raise CheckpointError(missing_file(error.filename, error.strerror, manifest)) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}): copy it again, or load another checkpoint"
        ) from error


def missing_file(path: object, reason: str | None, manifest: Manifest) -> str:
    """Return the message about a file that cannot be read, with its remedy."""
    return (
        f"{path}: {reason}; the checkpoint was written by {manifest.topology.world_size} ranks and needs the "
        "files of each: copy the missing ones, or load another checkpoint"
    )
