"""The store: one rank's pieces on disk, and the reader that puts logical tensors together again.

    rank_00000.safetensors   float32 pieces, one after the other; any safetensors library opens it
    rank_00000.json          what each piece is: tensor, state, global offsets, sizes, first byte, CRC-32

Needs numpy and json only: no torch, no process group, no DeepSpeed.
"""

import base64
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.pieces import are_disjoint, index_within, intersect, whole_box
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.shard import Box

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: the master weights and Adam's two moments."""

Array = npt.NDArray[np.float32]
DTYPE = np.dtype("<f4")


@dataclass(frozen=True)
class Piece:
    """A box of one state of a logical tensor."""

    tensor: str
    state: str
    box: Box


@dataclass(frozen=True)
class StoredPiece:
    """A piece in a file: where its bytes begin, and their CRC-32."""

    piece: Piece
    path: Path
    start: int
    crc32: int


def rank_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """The data file and the index file of a rank."""
    return folder / f"rank_{rank:05d}.safetensors", folder / f"rank_{rank:05d}.json"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a text file that survives a power cut once this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Sequence[Piece],
    arrays: Iterable[Array],
    random_states: Mapping[str, bytes],
) -> None:
    """Write the two files of a rank, durably. `arrays` are the pieces' values, asked for one at a time.

    Raises OSError.
    """
    data_path, index_path = rank_files(folder, rank)
    header = _safetensors_header(pieces)
    start = len(header)
    entries = []
    # The checksum of a piece is computed while the piece is written: both run without the GIL.
    with data_path.open("wb") as file, ThreadPoolExecutor(1) as checksums:
        file.write(header)
        for piece, array in zip(pieces, arrays, strict=True):
            assert array.shape == piece.box.sizes, f"{piece}: values of shape {array.shape}"
            contents = np.ascontiguousarray(array, dtype=DTYPE).reshape(-1).view(np.uint8).data
            checksum = checksums.submit(zlib.crc32, contents)
            file.write(contents)
            entries.append(
                {
                    "tensor": piece.tensor,
                    "state": piece.state,
                    "offsets": piece.box.offsets,
                    "sizes": piece.box.sizes,
                    "start": start,
                    "crc32": checksum.result(),
                }
            )
            start += contents.nbytes
        file.flush()
        os.fsync(file.fileno())
    random = {name: base64.b64encode(state).decode() for name, state in random_states.items()}
    index = {"rank": rank, "bytes": start, "random_states": random, "entries": entries}
    write_durably(index_path, json.dumps(index) + "\n")


def _safetensors_header(pieces: Sequence[Piece]) -> bytes:
    """The length and the JSON that a safetensors file begins with, padded so that data starts aligned."""
    header: dict[str, dict[str, object]] = {}
    numbers: Counter[str] = Counter()
    end = 0
    for piece in pieces:
        name = f"{piece.tensor}|{piece.state}"
        begin, end = end, end + piece.box.numel * DTYPE.itemsize
        header[f"{name}|{numbers[name]}"] = {
            "dtype": "F32",
            "shape": piece.box.sizes,
            "data_offsets": (begin, end),
        }
        numbers[name] += 1
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class CheckpointReader:
    """Reads boxes of logical tensors from the folder of a checkpoint, whatever topology wrote it.

    Opening checks that all files are there and as long as their indices say; reading checks that each
    element is stored exactly once, and the checksum of each piece that is read whole.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest and the indices. Raises CheckpointError."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._stored: dict[tuple[str, str], list[StoredPiece]] = {}
        self._mapped: dict[Path, npt.NDArray[np.uint8]] = {}
        for rank in range(self.manifest.topology.world_size):
            self._read_index(rank)

    def _read_index(self, rank: int) -> None:
        data_path, index_path = rank_files(self.folder, rank)
        try:
            raw = json.loads(index_path.read_text())
            expected_bytes = int(raw["bytes"])
            for entry in raw["entries"]:
                box = Box(tuple(entry["offsets"]), tuple(entry["sizes"]))
                piece = Piece(entry["tensor"], entry["state"], box)
                stored = StoredPiece(piece, data_path, entry["start"], entry["crc32"])
                self._stored.setdefault((piece.tensor, piece.state), []).append(stored)
            found_bytes = data_path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: {error.strerror}; the checkpoint was written by "
                f"{self.manifest.topology.world_size} ranks and needs the files of each: "
                "copy the missing ones, or load another checkpoint"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{index_path}: damaged ({type(error).__name__}: {error}): "
                "copy it again, or load another checkpoint"
            ) from error
        if found_bytes != expected_bytes:
            raise CheckpointError(
                f"{data_path}: has {found_bytes:,} bytes, its index says {expected_bytes:,}: "
                "copy it again, or load another checkpoint"
            )

    def random_states(self, rank: int) -> dict[str, bytes]:
        """The states of a rank's random generators, by device."""
        raw = json.loads(rank_files(self.folder, rank)[1].read_text())
        return {name: base64.b64decode(state) for name, state in raw["random_states"].items()}

    def _bytes_of(self, stored: StoredPiece) -> npt.NDArray[np.uint8]:
        """The piece's bytes, mapped into memory, not yet read."""
        if stored.path not in self._mapped:
            self._mapped[stored.path] = np.memmap(stored.path, np.uint8, mode="r")
        stop = stored.start + stored.piece.box.numel * DTYPE.itemsize
        return self._mapped[stored.path][stored.start : stop]

    def _check(self, stored: StoredPiece, contents: npt.NDArray[np.uint8]) -> None:
        if zlib.crc32(contents.data) != stored.crc32:
            raise CheckpointError(
                f"{stored.path}: {_named(stored.piece)} at byte {stored.start:,} is damaged "
                "(its CRC-32 differs): copy the file again, or load another checkpoint"
            )

    def read_box(self, tensor: str, state: str, box: Box) -> Array:
        """The elements of a box, float32 of shape `box.sizes`.

        Raises:
            CheckpointError: an element is not stored, or twice, or a piece that is read whole is damaged.
        """
        values = np.empty(box.sizes, DTYPE)
        shares = self._shares(tensor, state, box)
        for share, stored in shares:
            contents = self._bytes_of(stored)
            if share == stored.piece.box:
                self._check(stored, contents)
            held = contents.view(DTYPE).reshape(stored.piece.box.sizes)
            values[index_within(share, box)] = held[index_within(share, stored.piece.box)]
        return values

    def _shares(self, tensor: str, state: str, box: Box) -> list[tuple[Box, StoredPiece]]:
        """The stored parts that make up a box, each element once."""
        shares = [
            (share, stored)
            for stored in self._stored.get((tensor, state), [])
            if (share := intersect(stored.piece.box, box)) is not None
        ]
        covered = sum(share.numel for share, _ in shares)
        if covered != box.numel or not are_disjoint([share for share, _ in shares]):
            raise CheckpointError(
                f"{self.folder}: {_named(Piece(tensor, state, box))} has {box.numel:,} elements, of which "
                f"{covered:,} are stored, counted with repetition; each must be stored exactly once: "
                "load another checkpoint"
            )
        return shares

    def verify(self) -> None:
        """Read everything and check that it is undamaged and complete.

        Raises:
            CheckpointError: one line for each damaged piece and each tensor that is not stored exactly once.
        """
        problems = []
        for spec in self.manifest.specs.values():
            for state in STATES:
                try:
                    self._shares(spec.name, state, whole_box(spec.shape))
                except CheckpointError as error:
                    problems.append(str(error))
        for pieces in self._stored.values():
            for stored in pieces:
                try:
                    self._check(stored, self._bytes_of(stored))
                except CheckpointError as error:
                    problems.append(str(error))
        if problems:
            raise CheckpointError("\n".join(problems))


def _named(piece: Piece) -> str:
    ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(piece.box.offsets, piece.box.sizes, strict=True))
    return f"{piece.tensor}[{ranges}] ({piece.state})"
