"""Files of checkpoints, without processes: what is written is read, and what is wrong is said."""

import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_nexus.checkpoint import run_dir
from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.data_file import STATES, FilePart, parts_of_one_file
from megatron_nexus.checkpoint.manifest import (
    GrownRegion,
    read_manifest,
    spec_from_json,
    spec_to_json,
)
from megatron_nexus.checkpoint.run_dir import (
    check_save_folder,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
)
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.param import Axis, Constant, Normal, ParamSpec
from megatron_nexus.spec.shard import Box
from tests.support.two_rank_checkpoint import BOXES, MANIFEST, OF_FORMAT, SPEC, VALUES, slices, write


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    return write(tmp_path / "run")


def test_any_box_is_read_back(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for state in STATES:
        for box in (Box((0, 0), (5, 4)), Box((1, 1), (3, 2)), Box((2, 3), (1, 1)), *BOXES[0]):
            read = reader.read_box("w", state, box)
            assert read.dtype == np.float32
            assert (read == VALUES[state][slices(box)]).all()
    assert reader.random_states(1) == {"cpu": b"\x01"}
    reader.verify()


@pytest.mark.parametrize("per_file", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensors_are_the_same_however_many_ranks_write_however_many_files(
    tmp_path: Path, ranks: int, per_file: int
) -> None:
    rows = [Box((row, 0), (1, 4)) for row in range(5)]
    # Of four ranks the last has nothing to write.
    boxes = [rows[rank :: min(ranks, 3)] if rank < 3 else [] for rank in range(ranks)]
    folder = write(tmp_path, boxes=boxes, per_file=per_file)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == -(-ranks // per_file)
    assert len(list(folder.iterdir())) == len(files) + 2
    reader = CheckpointReader(folder)
    reader.verify()
    for state in STATES:
        assert (reader.read_box("w", state, full_box(SPEC.shape)) == VALUES[state]).all()
    assert [reader.random_states(rank) for rank in range(ranks)] == [
        {"cpu": bytes([r])} for r in range(ranks)
    ]
    found = [values for path in files for values in load_file(path).values()]
    assert sum(values.size for values in found) == len(STATES) * 20, "a stock library reads each of them"


def test_manifest_is_read_back(folder: Path) -> None:
    found = read_manifest(folder)
    assert found.files == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json"}
    assert dataclasses.replace(found, files={}) == MANIFEST


def test_parts_lie_in_as_many_files_as_asked_for_and_there_are_parts() -> None:
    for ranks, files in itertools.product(range(1, 9), repeat=2):
        parts = [FilePart(rank, []) for rank in range(10, 10 + ranks)]
        found = {tuple(p.rank for p in parts_of_one_file(parts, part.rank, files)) for part in parts}
        assert len(found) == min(files, ranks), (ranks, files)
        assert sorted(rank for names in found for rank in names) == [part.rank for part in parts]
        assert all(names == tuple(range(names[0], names[-1] + 1)) for names in found), "neighbours"


def test_format_version_3_is_read(tmp_path: Path) -> None:
    folder = find_checkpoint(shutil.copytree(OF_FORMAT[3], tmp_path / "run"))
    reader = CheckpointReader(folder)
    reader.verify()
    for state in STATES:
        assert (reader.read_box("w", state, full_box(SPEC.shape)) == VALUES[state]).all()
    assert [reader.random_states(rank) for rank in (0, 1)] == [{"cpu": b"\x00"}, {"cpu": b"\x01"}]
    assert dataclasses.replace(reader.manifest, files={}, format_version=4) == MANIFEST


def test_format_version_2_is_read(tmp_path: Path) -> None:
    root = shutil.copytree(OF_FORMAT[2], tmp_path / "run")
    folder = find_checkpoint(root)
    reader = CheckpointReader(folder)
    reader.verify()
    for state in STATES:
        assert (reader.read_box("w", state, full_box(SPEC.shape)) == VALUES[state]).all()
    assert [reader.random_states(rank) for rank in (0, 1)] == [{"cpu": b"\x00"}, {"cpu": b"\x01"}]
    grown = GrownRegion("w", Box((3, 0), (2, 4)), adam_step=2)
    assert reader.manifest.optimizer == dataclasses.replace(MANIFEST.optimizer, grown_regions=(grown,))
    write(root, 1)
    for name in ("rank_00001.json", "rank_00000.safetensors"):
        os.truncate(folder / name, 10)
        run_dir._tell_once.cache_clear()
        assert find_checkpoint(root).name == "iter_0000001"


def test_a_reader_opens_one_index_however_many_ranks_wrote(tmp_path: Path) -> None:
    elements = [Box((row, column), (1, 1)) for row in range(5) for column in range(4)]
    opened: list[str] = []
    listening = True

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open":
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(listen)  # for the life of this process
    for number, boxes in enumerate((BOXES, [[box] for box in elements])):
        folder = write(tmp_path, number, boxes=boxes)
        opened.clear()
        reader = CheckpointReader(folder)
        assert Counter(opened) == {"manifest.json": 2, "index.json": 1}, "to read it, and to lock it"
        opened.clear()
        reader.read_box("w", "fp32", Box((0, 0), (1, 1)))
        assert set(opened) == {"rank_00000.safetensors"}
    listening = False


@pytest.mark.parametrize("init", [Normal(0.02), Constant(1.0)])
def test_every_field_of_a_spec_is_kept(init: Normal | Constant) -> None:
    spec = dataclasses.replace(SPEC, init=init)
    raw = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json(raw) == spec
    kept = {field.name for field in dataclasses.fields(ParamSpec)} - {"growth_roles"} | {"grown"}
    assert set(raw) == kept
    assert set(raw["axes"][0]) == {field.name for field in dataclasses.fields(Axis)}


def test_stock_safetensors_opens_the_data(folder: Path) -> None:
    tensors = load_file(folder / "rank_00000.safetensors")
    assert set(tensors) == {f"w|{state}|{i}" for state in STATES for i in range(2)}
    assert (tensors["w|exp_avg|1"] == VALUES["exp_avg"][slices(BOXES[0][1])]).all()


def test_a_rank_may_own_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, boxes=[[full_box(SPEC.shape)], []])
    CheckpointReader(folder).verify()
    assert load_file(folder / "rank_00001.safetensors") == {}


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Twelve files more than now may be open at once."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(limits[0]) if number not in in_use]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[12], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_ranks_may_have_written_than_files_may_be_open(tmp_path: Path, few_descriptors: None) -> None:
    elements = [Box((row, column), (1, 1)) for row in range(5) for column in range(4)]
    folder = write(tmp_path, boxes=[[box] for box in elements])
    reader = CheckpointReader(folder)
    reader.verify()
    assert (reader.read_box("w", "fp32", full_box(SPEC.shape)) == VALUES["fp32"]).all()


@pytest.mark.parametrize(
    "second_rank", [BOXES[1][1:], [*BOXES[1], Box((0, 0), (1, 1))], [Box((0, 0), (1, 1)), BOXES[1][1]]]
)
def test_elements_must_be_stored_exactly_once(tmp_path: Path, second_rank: list[Box]) -> None:
    reader = CheckpointReader(write(tmp_path, boxes=[BOXES[0], second_rank]))
    for check in (lambda: reader.read_box("w", "fp32", full_box(SPEC.shape)), reader.verify):
        with pytest.raises(CheckpointError, match="exactly once"):
            check()
    reader.read_box("w", "fp32", BOXES[1][1])


def test_what_load_finds(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert newest_checkpoint(root) is None
    with pytest.raises(CheckpointError, match="holds nothing"):
        find_checkpoint(root)
    first, second = write(root, 1), write(root, 20)
    assert find_checkpoint(root) == newest_checkpoint(root) == second
    assert find_checkpoint(first) == first
    (root / "latest").write_text("iter_0000001\n")
    assert find_checkpoint(root) == first
    (root / "latest").unlink()
    assert find_checkpoint(root) == second
    (root / "latest").write_text("iter_0000020\n")
    (second / "rank_00001.safetensors").unlink()
    assert find_checkpoint(root) == first
    (second / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"iter_0000001, iter_0000020 \(without manifest.json\): give another",
    ):
        find_checkpoint(second)
    with pytest.raises(CheckpointError, match="has the checkpoints iter_0000001"):
        find_checkpoint(root / "iter_0000007")


@pytest.mark.parametrize("name", ["rank_00001.safetensors", "index.json", "manifest.json"])
@pytest.mark.parametrize("cut", [1, 100, None])
def test_load_goes_back_to_the_newest_whole_one_and_says_so(
    tmp_path: Path, name: str, cut: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    write(root, 1)
    second, third = write(root, 2), write(root, 3)
    file = third / name
    os.truncate(file, file.stat().st_size - cut if cut else 0)
    run_dir._tell_once.cache_clear()
    with caplog.at_level("INFO", logger="megatron_nexus"):
        assert find_checkpoint(root) == newest_checkpoint(root) == second
    assert caplog.text.count(f"warning: {third} is damaged ({name} ") == 1
    assert "going back to iter_0000002" in caplog.text
    assert list(complete_checkpoints(root)) == [1, 2]
    check_save_folder(root, second)  # the run goes on in its folder
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: ")):
        CheckpointReader(third).verify()


def test_a_folder_in_which_no_checkpoint_is_whole_is_never_begun_anew(tmp_path: Path) -> None:
    file = write(tmp_path, 3) / "rank_00000.safetensors"
    os.truncate(file, 10)
    for look in (lambda: newest_checkpoint(tmp_path), lambda: check_save_folder(tmp_path, None)):
        with pytest.raises(
            CheckpointError,
            match=r"no checkpoint in it is whole: .*iter_0000003 \(rank_00000.safetensors has 10 of",
        ):
            look()


def test_wrong_bytes_are_not_taken_for_an_end_that_is_missing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    for name in ("rank_00000.safetensors", "index.json"):
        contents = bytearray((folder / name).read_bytes())
        contents[len(contents) // 2] ^= 1
        (folder / name).write_bytes(contents)
    assert newest_checkpoint(tmp_path) == folder
    contents = bytearray((folder / "manifest.json").read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / "manifest.json").write_bytes(contents)
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_0000001", "the one before"


def test_a_save_cleans_up_after_dead_ones(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (tmp_path / ".tmp_iter_0000007").mkdir()
    aside = tmp_path / ".old_iter_0000001"
    folder.rename(aside)  # a save of step 1 died between its two renames
    assert find_checkpoint(tmp_path) == aside
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", "latest"]
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", "latest"]
