"""Recording: what the ranks of a run saw in a few steps, as parts of logical tensors in files of a folder.

    recording.json          what was run: written last, when all ranks are done
    rank_00000.json, .bin   the parts of one rank: where each lies in its tensor, and in the file

A tensor is known by its step, its phase and its logical name. Activations are [sample, token, unit]. Parts of
data-parallel ranks that `is_share` are added; other parts that overlap are copies of one another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.json_text import parse_json
from megatron_nexus.errors import ConfigError
from megatron_nexus.spec.shard import Box

if TYPE_CHECKING:
    from torch import Tensor  # which comparing needs not

RECORDING_FILE = "recording.json"
FORMAT = 1

Array = npt.NDArray[np.float64]


class Phase(StrEnum):
    """The parts of a step, in the order in which they happen."""

    WEIGHTS = "weights"
    DATA = "data"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    NORM = "gradient norm"
    OPTIMIZER = "optimizer"


PHASES = list(Phase)


class Key(NamedTuple):
    """A logical tensor of a recording."""

    step: int
    phase: Phase
    name: str


@dataclass(frozen=True)
class LogicalAxis:
    """An axis of a logical tensor: its name, its size, and how many neighbours make a head."""

    name: str
    size: int
    group: int = 1


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its mesh."""

    rank: int
    pp_rank: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class Part:
    """A part of a logical tensor that one rank holds; `start` is its first byte in the rank's file."""

    place: Place
    key: Key
    axes: tuple[LogicalAxis, ...]
    box: Box
    dtype: str
    start: int
    is_share: bool
    """Whether the tensor is the sum of the parts of all data-parallel ranks."""


@dataclass(frozen=True)
class RecordedRun:
    """What was recorded: the model, the batch, the samples whose activations are kept, the mesh."""

    model: Mapping[str, Any]
    seq_length: int
    global_batch_size: int
    samples: tuple[int, ...]
    steps: int
    dtype: str
    layout: str
    """The mesh in words."""
    format: int = FORMAT


class RecordingWriter:
    """Writes the parts of one rank."""

    def __init__(self, folder: Path, place: Place) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{place.rank:05d}.json"
        self._file: BinaryIO = self._path.with_suffix(".bin").open("wb")
        self._place = place
        self._parts: list[Part] = []
        self._orders: dict[Key, int] = {}

    def reserve(self, key: Key) -> None:
        """Note that a tensor comes now in the order of execution; its values may be written later."""
        self._orders.setdefault(key, len(self._orders))

    def write(
        self, key: Key, axes: Sequence[LogicalAxis], box: Box, values: "Tensor", is_share: bool = False
    ) -> None:
        """Write the values of a box of the tensor `key`."""
        self.reserve(key)
        held = values.detach().to("cpu")
        is_half = held.dtype.is_floating_point and held.dtype.itemsize == 2  # numpy has no bfloat16
        array = (held.float() if is_half else held).contiguous().numpy()
        assert array.size == box.numel, f"{key}: {array.shape} for {box}"
        if not array.size:
            return
        start = self._file.tell()
        self._parts.append(Part(self._place, key, tuple(axes), box, array.dtype.name, start, is_share))
        self._file.write(array.tobytes())

    def close(self) -> None:
        """Write what the file of values holds."""
        self._file.close()
        ordered = sorted(self._parts, key=lambda part: self._orders[part.key])
        parts = [{k: v for k, v in asdict(part).items() if k != "place"} for part in ordered]
        record = {"place": asdict(self._place), "parts": parts}
        self._path.write_text(json.dumps(record))


def finish_recording(folder: Path, run: RecordedRun) -> None:
    """Write what was run, which makes a recording complete: all ranks have closed their files."""
    (folder / RECORDING_FILE).write_text(json.dumps(asdict(run), indent=1))


@dataclass(frozen=True)
class Copies:
    """Two ranks whose copies of a part of a tensor differ: by how much, and where in the tensor."""

    ranks: tuple[int, int]
    difference: float


class Recording:
    """The recording in a folder. Its tensors are assembled one at a time."""

    def __init__(self, folder: Path) -> None:
        """Read what a recording holds, but no values. Raises ConfigError where it is none, or damaged."""
        self.folder = folder
        try:
            record = parse_json((folder / RECORDING_FILE).read_text())
            if record["format"] != FORMAT:
                raise ConfigError(
                    f"{folder} is a recording of format {record['format']}, this version reads {FORMAT}: "
                    "record it again"
                )
            self.run = RecordedRun(**{**record, "samples": tuple(record["samples"])})
            self._parts: dict[Key, list[Part]] = {}
            self._files: dict[int, np.memmap[Any, np.dtype[np.uint8]]] = {}
            self._order: dict[tuple[int, Phase], dict[int, dict[str, None]]] = {}
            for path in sorted(folder.glob("rank_*.json")):
                self._read(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{folder} is not a complete recording ({error}): write it with nexus compare --record"
            ) from error

    def _read(self, path: Path) -> None:
        record = parse_json(path.read_text())
        place = Place(**record["place"])
        values = path.with_suffix(".bin")
        if values.stat().st_size:
            self._files[place.rank] = np.memmap(values, np.uint8, "r")
        for entry in record["parts"]:
            step, phase, name = entry["key"]
            part = Part(
                place,
                key=Key(step, Phase(phase), name),
                axes=tuple(LogicalAxis(**axis) for axis in entry["axes"]),
                box=Box(tuple(entry["box"]["offsets"]), tuple(entry["box"]["sizes"])),
                dtype=entry["dtype"],
                start=entry["start"],
                is_share=entry["is_share"],
            )
            self._parts.setdefault(part.key, []).append(part)
            stages = self._order.setdefault((step, part.key.phase), {})
            stages.setdefault(place.pp_rank, {}).setdefault(name)

    @cached_property
    def keys(self) -> list[Key]:
        """The tensors in the order of execution: of pipeline stages forward, in the backward pass back."""
        found: dict[Key, None] = {}
        for step, phase in sorted(self._order, key=lambda one: (one[0], PHASES.index(one[1]))):
            stages = self._order[step, phase]
            for stage in sorted(stages, reverse=phase is Phase.BACKWARD):
                found.update(dict.fromkeys(Key(step, phase, name) for name in stages[stage]))
        return list(found)

    def axes(self, key: Key) -> tuple[LogicalAxis, ...]:
        """Return the axes of a tensor."""
        return self._parts[key][0].axes

    def parts(self, key: Key) -> list[Part]:
        """Return the parts of a tensor that the ranks hold."""
        return self._parts[key]

    def values(self, part: Part) -> Array:
        """Return the values of a part."""
        count = part.box.numel * np.dtype(part.dtype).itemsize
        raw = self._files[part.place.rank][part.start : part.start + count]
        return raw.view(part.dtype).reshape(part.box.sizes).astype(np.float64)

    def assemble(self, key: Key) -> tuple[Array, Copies | None]:
        """Return a logical tensor, NaN where no rank holds it, and which two copies differ most."""
        shape = tuple(axis.size for axis in self.axes(key))
        shares: dict[int, Array] = {}
        owners: dict[int, npt.NDArray[np.int32]] = {}
        worst: Copies | None = None
        for part in sorted(self._parts[key], key=lambda one: one.place.rank):
            share = part.place.dp_rank if part.is_share else 0
            if share not in shares:
                shares[share], owners[share] = np.full(shape, np.nan), np.full(shape, -1, np.int32)
            box = part.box
            mine, whole, owner = self.values(part), shares[share][box.index], owners[share][box.index]
            copied = owner >= 0
            if copied.any():
                same = (mine == whole) | (np.isnan(mine) & np.isnan(whole))
                apart = np.where(copied & ~same, np.abs(mine - whole), 0.0)
                apart[np.isnan(apart)] = np.inf
                if (largest := float(apart.max())) > (worst.difference if worst else 0.0):
                    first = int(owner.reshape(-1)[apart.argmax()])
                    worst = Copies((first, part.place.rank), largest)
            whole[~copied], owner[~copied] = mine[~copied], part.place.rank
        return sum(shares.values(), np.zeros(shape)), worst
