"""Sketches of a corpus on the disk: shards of rows, and a record of what they are sketches of.

    sketches.json       checkpoint, corpus, seed, K, ...
    00000000.f32        samples 0 to 255, [256, K] little-endian float32, each row of length sqrt(K)

A shard appears complete or not at all, so a search that was killed continues with the next one. A scan reads
float32 as fast as it can be mapped. Folders whose record has no `dtype` hold float16, 00000000.f16, which
must be widened first: they are read, and continued, at about half of the samples a second.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import atomic_file, require_space
from megatron_nexus.base.json_text import parse_json, record_of
from megatron_nexus.errors import ConfigError, DataError

RECORD_FILE = "sketches.json"
SHARD_SAMPLES = 256
DTYPE, OLD_DTYPE = np.dtype("<f4"), np.dtype("<f2")

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16]


@dataclass(frozen=True)
class SketchRecord:
    """All that decides the sketches of a corpus, but for rounding."""

    checkpoint: str
    """sha256 of its manifest and index."""
    corpus: str
    """sha256 of what decides its samples."""
    samples: int
    sketch_size: int
    """The requested length; 0: gradients themselves."""
    seed: int
    normalise: str
    preconditioner: str
    precision: str


def check_record(folder: Path, record: SketchRecord) -> "np.dtype[Any]":
    """Return the type of the numbers that a folder holds, or is to hold.

    Raises ConfigError where it holds the sketches of another search, DataError if damaged.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        if any(any(folder.glob(f"*{_ending(dtype)}")) for dtype in (DTYPE, OLD_DTYPE)):
            raise ConfigError(
                f"--save-sketches {folder} holds sketches without {RECORD_FILE}: give another folder"
            )
        return DTYPE
    try:
        raw = parse_json(path.read_bytes())
        name = raw.pop("dtype", OLD_DTYPE.name) if isinstance(raw, dict) else ""
        held = record_of(SketchRecord, raw)
        dtype = {kind.name: kind for kind in (DTYPE, OLD_DTYPE)}.get(name)
        if dtype is None:
            raise ValueError(f"dtype is {name!r:.80}")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} does not describe sketches ({error}): give another folder as --save-sketches"
        ) from None
    wanted = asdict(record)
    differing = [
        f"{name} {_short(value)}, not {_short(wanted[name])}"
        for name, value in asdict(held).items()
        if value != wanted[name]
    ]
    if differing:
        raise ConfigError(
            f"--save-sketches {folder} holds the sketches of another search ({'; '.join(differing)}), "
            "which have nothing in common with these: give another folder, or the checkpoint, corpus and "
            "flags that it was made with"
        )
    return dtype


class SketchStore:
    """A folder of sketches."""

    def __init__(self, folder: Path, record: SketchRecord, numbers: int) -> None:
        """Open a folder, or begin it; `numbers` is K.

        Raises ConfigError where it holds the sketches of something else, CheckpointError where the disk has
        too little space for those that are missing.
        """
        self._folder = folder
        self._numbers = numbers
        self._record = record
        #: Type of the numbers of its rows.
        self.dtype = check_record(folder, record)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / RECORD_FILE) as write:
            write((json.dumps(asdict(record) | {"dtype": self.dtype.name}, indent=1) + "\n").encode())
        samples = sum(len(self.rows(first)) for first in self.missing())
        require_space(folder, samples * numbers * self.dtype.itemsize)

    def _path(self, first: int) -> Path:
        return self._folder / f"{first:08d}{_ending(self.dtype)}"

    def rows(self, first: int) -> range:
        """Return the samples of the shard that begins with the sample `first`."""
        return range(first, min(first + SHARD_SAMPLES, self._record.samples))

    def missing(self) -> list[int]:
        """Return the first sample of each shard that is not there yet."""
        firsts = range(0, self._record.samples, SHARD_SAMPLES)
        return [first for first in firsts if not self._path(first).exists()]

    def read(self, first: int) -> Rows:
        """Map a shard into memory, [samples, K]. Raises DataError where it is of another length."""
        path, shape = self._path(first), (len(self.rows(first)), self._numbers)
        size, needed = path.stat().st_size, shape[0] * shape[1] * self.dtype.itemsize
        if size != needed:
            raise DataError(
                f"{path} has {size:,} bytes, {shape[0]} sketches of {shape[1]:,} numbers have {needed:,}: "
                "remove it, and it is computed again"
            )
        return np.memmap(path, self.dtype, "c", shape=shape)

    def write(self, first: int, rows: Rows) -> None:
        """Write a shard, durably. Raises OSError."""
        assert rows.shape == (len(self.rows(first)), self._numbers), rows.shape
        with atomic_file(self._path(first)) as write:
            write(np.ascontiguousarray(rows, self.dtype).data.cast("B"))


def _ending(dtype: "np.dtype[Any]") -> str:
    return f".f{8 * dtype.itemsize}"


def _short(value: object) -> str:
    """Return a value, of a sha256 its beginning."""
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else str(value)
