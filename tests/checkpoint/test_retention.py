"""Retention: what is kept, what goes, and that nothing goes that somebody needs."""

import shutil
from pathlib import Path

import pytest

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint.new_checkpoint import NewCheckpoint
from megatron_nexus.checkpoint.run_dir import delete_outdated, find_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from tests.support.two_rank_checkpoint import write


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "latest")


def steps(root: Path) -> list[int]:
    return [int(name.removeprefix("iter_")) for name in names(root)]


@pytest.mark.parametrize(
    ("latest", "every", "kept"),
    [(0, 0, [10, 20, 30, 40, 50]), (2, 0, [40, 50]), (1, 20, [20, 40, 50]), (9, 0, [10, 20, 30, 40, 50])],
)
def test_what_is_kept(tmp_path: Path, latest: int, every: int, kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
        delete_outdated(tmp_path, latest, every)
        assert find_checkpoint(tmp_path).name == f"iter_{step:07d}"
    assert steps(tmp_path) == kept


def test_only_those_go_that_latest_has_left_behind(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "latest").write_text("iter_0000002\n")
    delete_outdated(tmp_path, 1)
    assert steps(tmp_path) == [2, 3, 4]
    (tmp_path / "latest").unlink()
    delete_outdated(tmp_path, 1)
    assert steps(tmp_path) == [2, 3, 4]


def test_incomplete_ones_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "iter_0000002" / "rank_00001.safetensors").unlink()
    (tmp_path / "iter_0000003" / "manifest.json").write_text("{")
    write(tmp_path, 4)
    delete_outdated(tmp_path, 2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_one_that_is_being_read_goes_later(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, 1))
    write(tmp_path, 2)
    delete_outdated(tmp_path, 1)
    assert steps(tmp_path) == [1, 2]
    reader.verify()
    del reader
    delete_outdated(tmp_path, 1)
    assert steps(tmp_path) == [2]


def test_a_link_to_another_run_s_checkpoint_stays(tmp_path: Path) -> None:
    other = write(tmp_path / "other", 1)
    root = tmp_path / "run"
    root.mkdir()
    (root / "iter_0000001").symlink_to(other)
    write(root, 2)
    delete_outdated(root, 1)
    assert steps(root) == [1, 2]
    CheckpointReader(other).verify()


def test_a_half_deleted_one_is_no_checkpoint_and_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path) -> None:
        (path / "index.json").unlink()
        raise KeyboardInterrupt

    write(tmp_path, 1)
    write(tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", die)
        delete_outdated(tmp_path, 1)
    assert names(tmp_path) == [".deleted_iter_0000001", "iter_0000002"]
    shutil.rmtree(tmp_path / "iter_0000002")
    NewCheckpoint(tmp_path, 3, SingleProcess()).begin()
    assert names(tmp_path) == [".deleted_iter_0000001", ".tmp_iter_0000003"], "nothing was brought back"
    write(tmp_path, 3)
    delete_outdated(tmp_path, 1)
    assert steps(tmp_path) == [3]


def test_what_cannot_be_deleted_is_told_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".deleted_iter_0000000").write_text("a file in the way")
    write(tmp_path, 1)
    write(tmp_path, 2)
    delete_outdated(tmp_path, 1)
    assert "old checkpoints are left" in caplog.text
    assert find_checkpoint(tmp_path).name == "iter_0000002"
