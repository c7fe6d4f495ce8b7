"""The lock of a run's folder: one run at a time, whoever comes and goes; what was not used is not left."""

import random
import threading
import time
from pathlib import Path

import pytest

from megatron_nexus.base.durable import LOCK_FILE
from megatron_nexus.checkpoint.run_dir import run_dir_lock
from megatron_nexus.errors import CheckpointError, ConfigError


def test_what_was_made_and_not_used_is_gone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "runs" / "of" / "mine"
    with pytest.raises(CheckpointError), run_dir_lock(folder):
        assert (folder / LOCK_FILE).exists()
        raise CheckpointError("refused")
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_what_was_written_stays_and_so_does_a_folder_that_was_there(tmp_path: Path) -> None:
    with run_dir_lock(tmp_path / "used"):
        (tmp_path / "used" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["metrics.jsonl"]
    (tmp_path / "empty").mkdir()
    with run_dir_lock(tmp_path / "empty"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_second_is_told_who_is_the_first(tmp_path: Path) -> None:
    with (
        run_dir_lock(tmp_path),
        pytest.raises(ConfigError, match=r"in use by process \d+ on .*another --save"),
        run_dir_lock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("place", ["/proc/nexus", "file/run"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="give a folder that can be written"),
        run_dir_lock(tmp_path / place),
    ):
        pass


def test_of_many_that_come_and_go_one_at_a_time_holds_it(tmp_path: Path) -> None:
    """Locks belong to open files, so that threads compete as processes do."""
    folder, inside, most, turns = tmp_path / "runs" / "a", [], [], []
    begin = time.monotonic()

    def wanted() -> bool:
        waited = time.monotonic() - begin
        return waited < 0.5 or (waited < 20 and len(set(turns)) < 4)

    def compete(seed: int) -> None:
        rng = random.Random(seed)
        while wanted():
            try:
                with run_dir_lock(folder):
                    inside.append(seed)
                    most.append(len(inside))
                    time.sleep(rng.random() / 1000)
                    inside.remove(seed)
                    turns.append(seed)
            except ConfigError:
                time.sleep(rng.random() / 1000)

    threads = [threading.Thread(target=compete, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert set(turns) == set(range(4)), "each had a turn"
    assert list(tmp_path.rglob(LOCK_FILE)) == []
