"""Checkpoints of format version 2, which had an index for each rank, and its random states in that.

rank_00000.json   the length of the rank's data file, its chunks, the rank's random states
"""

import base64
import zlib
from collections.abc import Mapping

from megatron_nexus.checkpoint.checksummed_json import is_truncated, loads_with_crc
from megatron_nexus.checkpoint.data_file import DataFileRecord, data_file_name, safetensors_header
from megatron_nexus.checkpoint.index import Index, raise_all, read_checked, stored_from_json
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.errors import CheckpointError


def _index_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def read_indices(folder: Location, manifest: Manifest) -> Index:
    """Read the indices of all ranks. Raises CheckpointError that lists all that are damaged."""
    files, random_states, problems = [], [], []
    for rank in range(manifest.topology.world_size):
        try:
            raw = read_checked(folder / _index_name(rank), manifest)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        chunks = tuple(map(stored_from_json, raw["entries"]))
        header = safetensors_header([stored.chunk for stored in chunks])
        crc32 = zlib.crc32(header)
        name = data_file_name([rank])
        files.append(DataFileRecord(name, raw["bytes"], len(header), crc32, (rank,), chunks))
        random_states.append({name: base64.b64decode(text) for name, text in raw["random_states"].items()})
    raise_all(problems)
    return Index(files, random_states)


def rank_defect(folder: Location, rank: int, held: Mapping[str, int]) -> str:
    """Say what the files of a rank lack, given all files with their sizes; "" if nothing."""
    data, index = data_file_name([rank]), _index_name(rank)
    for name in (data, index):
        if name not in held:
            return f"without {name}"
    contents = (folder / index).read_bytes()
    if is_truncated(contents):
        return f"{index} is cut short"
    try:
        expected = int(loads_with_crc(contents)["bytes"])
    except (KeyError, TypeError, ValueError):
        return ""  # wrong bytes: loading refuses them
    return f"{data} has {held[data]:,} of {expected:,} bytes" if held[data] != expected else ""
