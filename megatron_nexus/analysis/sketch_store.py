"""Sketches of a corpus on the disk: shards of half-precision rows, and a record of what they are sketches of.

    sketches.json       checkpoint, corpus, seed, K, ...
    00000000.f16        samples 0 to 255, [256, K] little-endian float16, each row of length sqrt(K)

A shard appears complete or not at all, so a search that was killed continues with the next one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import atomic_file, require_space
from megatron_nexus.base.json_text import parse_json, record_of
from megatron_nexus.errors import ConfigError, DataError

RECORD_FILE = "sketches.json"
SHARD_SAMPLES = 256
DTYPE = np.dtype("<f2")

Rows = npt.NDArray[np.float16]


@dataclass(frozen=True)
class SketchRecord:
    """All that decides the sketches of a corpus, but for rounding."""

    checkpoint: str
    """sha256 of its manifest and index."""
    corpus: str
    """sha256 of what decides its samples."""
    samples: int
    sketch_size: int
    """As asked for: 0 for gradients themselves."""
    seed: int
    normalise: str
    preconditioner: str
    precision: str


def check_record(folder: Path, record: SketchRecord) -> None:
    """Raise ConfigError where a folder holds the sketches of another search, DataError if damaged."""
    path = folder / RECORD_FILE
    if not path.exists():
        if any(folder.glob("*.f16")):
            raise ConfigError(
                f"--save-sketches {folder} holds sketches without {RECORD_FILE}: give another folder"
            )
        return
    try:
        held = record_of(SketchRecord, parse_json(path.read_bytes()))
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
        check_record(folder, record)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / RECORD_FILE) as write:
            write((json.dumps(asdict(record), indent=1) + "\n").encode())
        samples = sum(len(self.rows(first)) for first in self.missing())
        require_space(folder, samples * numbers * DTYPE.itemsize)

    def _path(self, first: int) -> Path:
        return self._folder / f"{first:08d}.f16"

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
        size, needed = path.stat().st_size, shape[0] * shape[1] * DTYPE.itemsize
        if size != needed:
            raise DataError(
                f"{path} has {size:,} bytes, {shape[0]} sketches of {shape[1]:,} numbers have {needed:,}: "
                "remove it, and it is computed again"
            )
        return np.memmap(path, DTYPE, "c", shape=shape)

    def write(self, first: int, rows: Rows) -> None:
        """Write a shard, durably. Raises OSError."""
        assert rows.shape == (len(self.rows(first)), self._numbers), rows.shape
        with atomic_file(self._path(first)) as write:
            write(np.ascontiguousarray(rows, DTYPE).data.cast("B"))


def _short(value: object) -> str:
    """Return a value, of a sha256 its beginning."""
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else str(value)
