"""Locks have one holder, and files and folders appear complete or not at all."""

import errno
import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megatron_nexus import log
from megatron_nexus.base import durable
from megatron_nexus.base.durable import LOCK_FILE, atomic_dir, atomic_file, dir_lock, exclusive_lock
from megatron_nexus.checkpoint.storage import LocalFolder


def test_a_lock_file_that_was_removed_and_made_anew_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive_lock(path) as first:
        path.unlink()
        with exclusive_lock(path) as second:  # another file of that name: nobody holds it
            assert not os.path.samestat(os.fstat(first), os.fstat(second))
            with pytest.raises(BlockingIOError), exclusive_lock(path):
                pass


def test_a_folder_is_locked_itself(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path), pytest.raises(BlockingIOError), exclusive_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_flock_work_goes_on_and_one_warning_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)  # no file system here is without it
    durable._warn.cache_clear()
    log.configure(is_main_rank=True)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").touch()
    LocalFolder(checkpoint).lock_for_reading()()
    assert console.readouterr().out == "", "a reader needs no lock"
    for _ in range(2):
        with dir_lock(tmp_path):
            assert (tmp_path / LOCK_FILE).exists()
    text = console.readouterr().out
    assert text.count("warning: ") == 1
    assert f"{tmp_path} is on a file system without file locks (flock: {os.strerror(number)})" in text
    assert LocalFolder(checkpoint).delete()
    assert not checkpoint.exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_another_error_of_flock_is_raised_to_writers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "manifest.json").touch()
    LocalFolder(tmp_path).lock_for_reading()()
    with pytest.raises(OSError, match="Input/output"), exclusive_lock(tmp_path / "lock"):
        pass


def test_a_lock_without_create_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), exclusive_lock(tmp_path / "manifest.json", create=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    with atomic_file(path) as write:
        write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as write:
        write(b"half of the n")
        raise ZeroDivisionError
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    with atomic_file(path) as write:
        write(b"new")
        assert path.read_bytes() == b"old"
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"new", [path])


def _write_and_wait(folder: Path, begun: "multiprocessing.synchronize.Event") -> None:
    with atomic_dir(folder) as draft:
        (draft / "below").mkdir()
        (draft / "below" / "half").write_text("half")
        begun.set()
        signal.pause()


def test_a_folder_appears_complete_and_a_killed_writer_leaves_nothing_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=_write_and_wait, args=(folder, begun))
    process.start()
    assert begun.wait(20)
    with pytest.raises(BlockingIOError), atomic_dir(folder):
        pass
    assert not folder.exists()
    process.kill()
    process.join()
    with pytest.raises(ZeroDivisionError), atomic_dir(folder) as draft:
        assert list(draft.iterdir()) == [], "what the killed process left is cleared"
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_dir(folder) as draft:
        (draft / "whole").write_text("whole")
        assert not folder.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "whole"]
