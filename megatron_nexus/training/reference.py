"""The reference model of an unlearning run: what its losses need of the model that was loaded.

Computed once, by the ranks' own forward passes before the first step, and kept in the run's folder: no second
copy of the model is held, and a resumed run reads the same numbers, at any topology, if their checksums hold.

    npo    log p_ref of each answer to forget: a number a sample
    klr    the logits at each token of the answers to retain: 4 V bytes a token on disk (1,000 answers of 50
           tokens, V 32,000: 6.4 GB), of which a micro-batch reads its own, one more [T, B, V] in float32

Each writing rank has a file of its own: ranks of several hosts never write to one file.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nexus.base.durable import atomic_file, fsync, require_space
from megatron_nexus.base.json_text import record_of
from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc, loads_with_crc
from megatron_nexus.data.answers import IGNORED_LABEL
from megatron_nexus.errors import CheckpointError

FOLDER, FILE = "reference", "reference.json"


@dataclass(frozen=True)
class LogitsFile:
    """What one rank has written: the logits of some samples to retain, of a part of the vocabulary."""

    name: str
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    """Tokens of each sample's answer."""
    columns: tuple[int, int]
    crc32: int | None = None
    """Checksum of its rows; None in folders that were written without."""


class Reference:
    """The numbers of the reference model, by the sample's place in its set."""

    def __init__(
        self,
        log_p: Sequence[float] = (),
        files: Sequence[tuple[LogitsFile, npt.NDArray[np.float32]]] = (),
        columns: tuple[int, int] = (0, 0),
        width: int = 0,
    ) -> None:
        """`columns`: this rank's part of the vocabulary; `width`: with padding, 0 without logits."""
        self._log_p = log_p
        self._columns, self._width = columns, width
        self._parts: dict[int, list[tuple[npt.NDArray[np.float32], int, int, int]]] = {}
        for record, rows in files:
            if record.columns[0] < columns[1] and columns[0] < record.columns[1]:
                first = 0
                for sample, length in zip(record.samples, record.lengths, strict=True):
                    part = (rows, first, length, record.columns[0])
                    self._parts.setdefault(sample, []).append(part)
                    first += length

    def log_p(self, sample: int) -> float:
        """Return log p_ref of an answer to forget; 0 where no loss has it."""
        return self._log_p[sample] if self._log_p else 0.0

    def logits(self, samples: Sequence[int | None], labels_BT: Tensor) -> Tensor:
        """Return the logits [T, B, V] at the answers' tokens, else zero; V is 0 where no loss has them."""
        made_TBV = torch.zeros(labels_BT.shape[1], len(samples), self._width)
        start, stop = self._columns
        for row, sample in enumerate(samples):
            if sample is None or not self._width:
                continue
            places = (labels_BT[row] != IGNORED_LABEL).nonzero()[:, 0]
            for rows, first, length, column in self._parts.get(sample, ()):  # none of padding alone
                low, high = max(start, column), min(stop, column + rows.shape[1])
                found = np.array(rows[first : first + length, low - column : high - column])
                made_TBV[places, row, low - start : high - start] = torch.from_numpy(found)
        return made_TBV


NO_REFERENCE = Reference()


class ReferenceFolder:
    """Where a run keeps the numbers of its reference model; its JSON file is written last."""

    def __init__(self, run_dir: Path, fingerprint: str) -> None:
        """`fingerprint` is of the run's samples."""
        self._folder, self._fingerprint = run_dir / FOLDER, fingerprint

    def begin(self) -> None:
        """Drop what an earlier start has left that ended before its first step. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.iterdir():
            left.unlink()

    def open_logits(self, record: LogitsFile) -> np.memmap[Any, np.dtype[np.float32]]:
        """Return the rows [tokens, columns] of a rank's file to fill. Raises CheckpointError, OSError."""
        shape = sum(record.lengths), record.columns[1] - record.columns[0]
        require_space(self._folder, 4 * shape[0] * shape[1])
        return np.lib.format.open_memmap(self._folder / record.name, "w+", np.float32, shape)

    def close_logits(self, record: LogitsFile, rows: np.memmap[Any, np.dtype[np.float32]]) -> LogitsFile:
        """Write the rows of a rank's file to the disk, durably; return it with a checksum. Raises OSError."""
        rows.flush()
        fsync(self._folder / record.name)
        return replace(record, crc32=zlib.crc32(rows.data.cast("B")))

    def finish(self, log_p: Sequence[float], files: Sequence[LogitsFile]) -> None:
        """Write what names the rest; one rank does so, after all files. Raises OSError."""
        record = {
            "fingerprint": self._fingerprint,
            "log_p": list(log_p),
            "files": [asdict(file) for file in files],
        }
        with atomic_file(self._folder / FILE) as write:
            write(dumps_with_crc(record).encode())

    def read(self, columns: tuple[int, int], width: int, verifies: bool) -> Reference:
        """Return the numbers, with this rank's part of the vocabulary.

        One that `verifies` reads every byte of the logits first. Raises CheckpointError.
        """
        path = self._folder / FILE
        remedy = "copy the folder again, or begin another run with another --save"
        try:
            found = loads_with_crc(path.read_bytes())
            records = [record_of(LogitsFile, raw) for raw in found["files"]]
            files = [(one, np.load(self._folder / one.name, mmap_mode="r")) for one in records]
            for one, rows in files:
                if rows.shape != (sum(one.lengths), one.columns[1] - one.columns[0]):
                    raise ValueError(f"{one.name} has the shape {rows.shape}")
                if verifies and one.crc32 is not None and zlib.crc32(rows.data.cast("B")) != one.crc32:
                    raise ValueError(f"the checksum of {one.name} is wrong")
            if found["fingerprint"] != self._fingerprint:
                raise ValueError("it is of other samples")
            return Reference(found["log_p"], files, columns, width if files else 0)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror}; the run's losses need what its reference model gave: {remedy}"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged ({error}): {remedy}") from error
