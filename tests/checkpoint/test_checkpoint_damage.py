"""Damage: whatever byte of whatever file is wrong or missing, one error names the file; older ones load."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint import data_file, store
from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.data_file import STATES, Chunk, FilePart, write_chunks
from megatron_nexus.checkpoint.manifest import FORMAT_VERSION, manifest_to_json
from megatron_nexus.checkpoint.new_checkpoint import new_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.shard import Box
from tests.support.two_rank_checkpoint import BOXES, MANIFEST, OF_FORMAT, SPEC, write

FILES = ["index.json", "manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
FILES_OF = {
    "new": FILES,
    "shared": [*FILES[:2], "ranks_00000-00001.safetensors"],
    "format 2": [*FILES[1:], "rank_00000.json", "rank_00001.json"],
}
EDGE = 24


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each layout and format version, each next to an older one."""
    root = tmp_path_factory.mktemp("damage")
    for name in FILES_OF:
        write(root / name, 1)
    old = shutil.copytree(OF_FORMAT[2] / "iter_0000003", root / "format 2" / "iter_0000003")
    return {"new": write(root / "new"), "shared": write(root / "shared", per_file=2), "format 2": old}


@pytest.fixture
def checkpoint(both: dict[str, Path]) -> Path:
    return both["new"]


def positions(path: Path, stride: int) -> list[int]:
    """Bytes at both ends of a file, and every `stride`-th between them."""
    length = path.stat().st_size
    return sorted({*range(EDGE), *range(EDGE, length, stride), *range(length - EDGE, length)})


def read_all(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for state in STATES:
        reader.read_box("w", state, full_box(SPEC.shape))


def flip(contents: bytes, position: int) -> bytes:
    return contents[:position] + bytes([contents[position] ^ 1]) + contents[position + 1 :]


def lose(contents: bytes, position: int) -> bytes:
    return contents[:position] + contents[position + 1 :]


CASES = [(age, name) for age, files in FILES_OF.items() for name in files]
OLD_AS_LAWS = [
    pytest.param(age, name, marks=pytest.mark.law if age == "format 2" else ()) for age, name in CASES
]


def test_every_file_is_damaged_here(both: dict[str, Path]) -> None:
    found = {(age, path.name) for age, folder in both.items() for path in folder.iterdir()}
    assert found == set(CASES)


@pytest.mark.parametrize(("damage", "stride"), [(flip, 97), pytest.param(lose, 29, marks=pytest.mark.law)])
@pytest.mark.parametrize(("age", "name"), OLD_AS_LAWS)
def test_one_byte_is_found_by_loading_and_by_verifying(
    both: dict[str, Path], age: str, name: str, damage: Callable[[bytes, int], bytes], stride: int
) -> None:
    checkpoint = both[age]
    path = checkpoint / name
    whole = path.read_bytes()
    try:
        for position in positions(path, stride):
            path.write_bytes(damage(whole, position))
            for action in (read_all, lambda folder: CheckpointReader(folder).verify()):
                with pytest.raises(CheckpointError) as error:
                    action(checkpoint)
                assert str(error.value).startswith(f"{path}: "), position
                assert "\n" not in str(error.value)
                assert "load" in str(error.value), "no remedy"
    finally:
        path.write_bytes(whole)
    read_all(checkpoint)
    read_all(checkpoint.with_name("iter_0000001"))


@pytest.mark.parametrize(("age", "name"), CASES)
def test_a_missing_or_longer_or_empty_file_is_named(
    both: dict[str, Path], tmp_path: Path, age: str, name: str
) -> None:
    folder = shutil.copytree(both[age], tmp_path / both[age].name)
    path = folder / name
    whole = path.read_bytes()
    for contents in (whole + b"x", b"", None):
        if contents is None:
            path.unlink()
        else:
            path.write_bytes(contents)
        with pytest.raises(CheckpointError) as error:
            read_all(folder)
        assert str(error.value).startswith(f"{path}: ")
        if contents is None:
            assert ("is incomplete" if name == "manifest.json" else "written by 2 ranks") in str(error.value)


def test_all_damaged_files_are_told_at_once(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    for name in FILES[2:]:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: (?s:.*)\n.*rank_00001.safetensors: "):
        CheckpointReader(folder).verify()


@pytest.mark.parametrize(("version", "age"), [(FORMAT_VERSION + 1, "newer"), (1, "older")])
def test_another_format_version_is_named(checkpoint: Path, tmp_path: Path, version: int, age: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    other = dataclasses.replace(MANIFEST, format_version=version)
    (folder / "manifest.json").write_text(manifest_to_json(other))
    with pytest.raises(CheckpointError, match=rf"manifest.json: format version {version} is {age}"):
        CheckpointReader(folder)


def test_a_part_is_checked_by_the_blocks_that_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", 64)
    monkeypatch.setattr(data_file, "BLOCK_BYTES", 64)
    # 5 rows of 4 elements: 80 bytes, rows 0 to 3 in the first block, row 4 in the second.
    chunks = [Chunk("w", state, full_box(SPEC.shape)) for state in STATES]
    with new_checkpoint(tmp_path, 1, SingleProcess()) as made:
        values = (np.ones(SPEC.shape, np.float32) for _ in chunks)
        made.finish(MANIFEST, [write_chunks(made.folder, [FilePart(0, chunks)], values)])
    data = made.path / "rank_00000.safetensors"
    data.write_bytes(flip(data.read_bytes(), data.stat().st_size - 1))  # in row 4 of exp_avg_sq
    reader = CheckpointReader(made.path)
    assert (reader.read_box("w", "exp_avg_sq", Box((1, 1), (3, 2))) == 1).all()
    for box in (Box((4, 3), (1, 1)), Box((0, 3), (5, 1))):
        with pytest.raises(CheckpointError, match=r"w\[0:5, 0:4\] \(exp_avg_sq\) is damaged within a MiB"):
            reader.read_box("w", "exp_avg_sq", box)


@pytest.mark.parametrize("rank", [0, 1])
def test_verifying_names_the_tensor_and_the_place(checkpoint: Path, tmp_path: Path, rank: int) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    data = folder / f"rank_0000{rank}.safetensors"
    data.write_bytes(flip(data.read_bytes(), data.stat().st_size - 1))
    box = BOXES[rank][-1]
    ranges = ", ".join(f"{o}:{o + s}" for o, s in zip(box.offsets, box.sizes, strict=True))
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(folder).verify()
    assert f"{data}: w[{ranges}] (exp_avg_sq) is damaged" in str(error.value)
