"""The header of a safetensors file of others, with every check that the library safetensors makes.

8 bytes   length of the header, little-endian
header    JSON: for each tensor its type, shape, first and last byte in the data
data      row-major tensors, one after the other, without gaps, up to the end of the file
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange.architecture import JsonObject

# Numpy's type for each of the format's that is imported; bfloat16, of which numpy knows nothing, is the
# upper half of float32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""The library's own limit."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, its shape, where its bytes begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Raises CheckpointError: the file cannot be read, breaks a rule of the format, or holds a type that is not
    imported.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MOST_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length).decode()
        if not text.startswith("{"):
            raise ValueError("its header does not begin with {")
        header = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        return _tensors(path, header, LENGTH_BYTES + length, size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: copy the missing file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): copy it again") from error


def _tensors(path: Path, header: JsonObject, data_start: int, size: int) -> dict[str, StoredTensor]:
    """Return the tensors of a header. Raises ValueError where they do not cover each data byte once."""
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("__metadata__ is not an object of texts")
    found, ranges = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{name} is not an object")
        dtype = entry.get("dtype")
        shape, offsets = (_whole_numbers(name, key, entry.get(key)) for key in ("shape", "data_offsets"))
        if len(offsets) != 2:
            raise ValueError(f"{name} has data_offsets {offsets}, which are not two")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is of the type {dtype}, of which nothing is imported: save the model in "
                f"one of {', '.join(DTYPES)}"
            )
        begin, end = offsets
        if end - begin != prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} of the shape {shape} in {dtype} takes other than {end - begin} bytes")
        ranges.append((begin, end, name))
        found[name] = StoredTensor(path, dtype, shape, data_start + begin)
    last = 0
    for begin, end, name in sorted(ranges):
        if begin != last:
            raise ValueError(
                f"{name} begins at byte {begin:,} of the data, and what is before ends at {last:,}"
            )
        last = end
    if data_start + last != size:
        raise ValueError(
            f"its tensors end at byte {data_start + last:,}, and the file has {size:,}: it was cut off, or "
            "something follows them"
        )
    return found


def _whole_numbers(name: str, key: str, found: object) -> tuple[int, ...]:
    """Return a list of whole numbers from 0 on. Raises ValueError."""
    if not isinstance(found, list) or not all(type(number) is int and number >= 0 for number in found):
        raise ValueError(f"{name} has {key} {found!r}, which are not whole numbers from 0 on")
    return tuple(found)


def _without_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    made: JsonObject = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name} stands in its header twice")
        made[name] = value
    return made


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} in its header")
