"""Locks of files: one holder at a time; and where the file system has none, work goes on with one warning."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megatron_nexus import log
from megatron_nexus.base import file_lock
from megatron_nexus.base.file_lock import LOCK_FILE, acquire, locked, locked_folder
from megatron_nexus.checkpoint.storage import LocalFolder


def test_a_lock_file_that_was_removed_and_made_anew_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = acquire(path)
    path.unlink()
    with locked(path) as second:  # another file of that name: nobody holds it
        assert not os.path.samestat(os.fstat(first), os.fstat(second))
        with pytest.raises(BlockingIOError):
            acquire(path)
    os.close(first)


def test_a_folder_is_locked_itself(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BlockingIOError):
        acquire(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_flock_work_goes_on_and_one_warning_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)  # no file system here is without it
    file_lock._warn.cache_clear()
    log.configure(speaks=True)
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").touch()
    LocalFolder(checkpoint).lock_for_reading()()
    assert console.readouterr().out == "", "a reader needs no lock"
    for _ in range(2):
        with locked_folder(tmp_path):
            assert (tmp_path / LOCK_FILE).exists()
    told = console.readouterr().out
    assert told.count("warning: ") == 1
    assert f"{tmp_path} is on a file system without file locks (flock: {os.strerror(number)})" in told
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
    with pytest.raises(OSError, match="Input/output"):
        acquire(tmp_path / "lock")
