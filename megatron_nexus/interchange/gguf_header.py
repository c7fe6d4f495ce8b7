"""The header of a GGUF file, walked through before the library gguf reads it. Sealed: `gguf`.

    magic, version, number of tensors, number of fields
    fields     each a name, a type and a value; texts and arrays say how long they are
    tensors    each a name, its sizes, a type, and where it begins in the data
    data       from the next multiple of the alignment on: tensors in order, each padded to the alignment

The library trusts every length: one of 2^60 keeps it busy for ever, and tensors may overlap. llama.cpp makes
the checks that are made here.
"""

import os
import struct
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_AXES = 4
DEFAULT_ALIGNMENT = 32
VALUE_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def check_gguf(path: Path) -> None:
    """Raise ValueError where a file breaks a rule of the format; OSError where it cannot be read."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < len(MAGIC):
            raise ValueError("it does not begin with GGUF")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as contents:
            _Walk(contents).check()


class _Walk:
    """A walk through the bytes of a file, which remembers where it stands."""

    def __init__(self, contents: mmap) -> None:
        self._contents = contents
        self._at = 0
        self._order = "<"

    def check(self) -> None:
        """Check the header and the places of its tensors. Raises ValueError."""
        if self._take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written by a machine of the other byte order
            self._order, version = ">", struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}, and known are {VERSIONS[0]} and {VERSIONS[1]}")
        tensors, fields = self._number("Q"), self._number("Q")
        names: set[str] = set()
        alignment = DEFAULT_ALIGNMENT
        for _ in range(fields):
            name = self._new_name(names)
            kind = self._kind()
            if name == "general.alignment" and kind is GGUFValueType.UINT32:
                alignment = self._number("I")
            else:
                self._skip(kind)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment} is not a power of two")
        names = set()
        end = 0
        for _ in range(tensors):
            end = self._check_tensor(self._new_name(names), end, alignment)
        start = -(-self._at // alignment) * alignment
        if start + end > len(self._contents):
            raise ValueError(
                f"its tensors end at byte {start + end:,}, and the file has {len(self._contents):,}"
            )

    def _check_tensor(self, name: str, end: int, alignment: int) -> int:
        """Read what is said of a tensor, which begins where the last one ended. Returns where it ends."""
        axes = self._number("I")
        if axes > MOST_AXES:
            raise ValueError(f"{name} has {axes} axes, and {MOST_AXES} are the most")
        sizes = [self._number("Q") for _ in range(axes)]
        kind, offset = GGMLQuantizationType(self._number("I")), self._number("Q")
        elements, stored = GGML_QUANT_SIZES[kind]
        row = sizes[0] if sizes else 1
        if row % elements:
            raise ValueError(f"{name} has rows of {row}, and {kind.name} has blocks of {elements}")
        begin = -(-end // alignment) * alignment
        if offset != begin:
            raise ValueError(f"{name} begins at byte {offset:,} of the data, and not at {begin:,}")
        return begin + prod(sizes) // elements * stored

    def _take(self, count: int) -> bytes:
        self._pass(count)
        return self._contents[self._at - count : self._at]

    def _number(self, code: str) -> int:
        layout = struct.Struct(self._order + code)
        return int(layout.unpack(self._take(layout.size))[0])

    def _new_name(self, names: set[str]) -> str:
        """Read a name and add it to `names`. Raises ValueError where it is there already."""
        name = self._take(self._number("Q")).decode()
        if name in names:
            raise ValueError(f"{name} stands in it twice")
        names.add(name)
        return name

    def _kind(self) -> GGUFValueType:
        return GGUFValueType(self._number("I"))

    def _skip(self, kind: GGUFValueType) -> None:
        """Skip a value."""
        if kind is GGUFValueType.STRING:
            self._pass(self._number("Q"))
        elif kind is not GGUFValueType.ARRAY:
            self._pass(VALUE_BYTES[kind])
        else:
            of, count = self._kind(), self._number("Q")
            if of is GGUFValueType.ARRAY:
                raise ValueError("it holds an array of arrays")
            if of is not GGUFValueType.STRING:
                self._pass(count * VALUE_BYTES[of])
                return
            for _ in range(count):
                self._pass(self._number("Q"))

    def _pass(self, count: int) -> None:
        if count > len(self._contents) - self._at:
            raise ValueError(f"{count:,} bytes are said to follow byte {self._at:,}, where it ends before")
        self._at += count
