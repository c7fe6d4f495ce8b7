"""Law: the rank that hangs is named, not one that waits for it, and all others leave with exit code 75.

Real processes with gloo; that they leave, and leave no process behind, is what `spawn` looks at.
"""

import re
import signal
import time
from pathlib import Path

import pytest

from megatron_nexus.errors import EXIT_CODE_RESTART
from megatron_nexus.parallel.beacon import Beacon, Phase
from tests.parallel.rank_watch_worker import FAULTY_STEP
from tests.support.cli import warm_ranks
from tests.support.paths import TESTS
from tests.support.subprocesses import Program, Spawn
from tests.support.waiting import scaled_by_load, wait_for

RANKS = 3

pytestmark = pytest.mark.law


def start(spawn: Spawn, folder: Path, fault: str, rank: int) -> Program:
    worker = str(TESTS / "parallel" / "rank_watch_worker.py")
    return spawn([*warm_ranks(RANKS), worker, fault, str(rank), str(folder / "stacks")], folder)


@pytest.mark.parametrize(
    ("fault", "rank", "expected"),
    [
        ("frozen", 2, f", last seen in step {FAULTY_STEP}, reading data \\d+ s ago: its process is stopped"),
        (
            "frozen after a long phase",
            1,
            f", last seen in step {FAULTY_STEP}, reading data \\d+ s ago: its process is stopped",
        ),
        ("frozen", 0, f", last seen in step {FAULTY_STEP}, reading data \\d+ s ago: its process is stopped"),
        ("slow", 1, f" is alive, in step {FAULTY_STEP}, reading data for \\d+ s"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_others_leave(
    spawn: Spawn, tmp_path: Path, fault: str, rank: int, expected: str
) -> None:
    began = time.monotonic()
    program = start(spawn, tmp_path, fault, rank)
    assert program.end() == EXIT_CODE_RESTART, program.output()
    output = program.output()
    assert time.monotonic() - began < scaled_by_load(30.0)
    assert len(re.findall("no progress for ", output)) == 1, output
    named = rf"\(--rank-heartbeat-timeout\): rank {rank} on \S+ \(process \d+\)"
    assert re.search(named + expected, output), output
    assert f"exit code {EXIT_CODE_RESTART}: start the same command again, with --load auto" in output
    stacks = sorted(path.name for path in (tmp_path / "stacks").iterdir())
    living = [r for r in range(RANKS) if r != rank or fault == "slow"]
    assert stacks == [f"stacks_rank_{r:05d}.txt" for r in living]
    victim = (tmp_path / "stacks" / stacks[-1 if rank != 2 else 0]).read_text()
    assert "all_reduce" in victim and "rank_watch_worker.py" in victim
    wait_for(lambda: program.left() == {}, "the end of all")


def test_a_rank_that_is_killed_is_named(spawn: Spawn, tmp_path: Path) -> None:
    program = start(spawn, tmp_path, "killed", 1)
    assert program.end() == 128 + signal.SIGKILL  # that of the launcher: the first to leave
    output = program.output()
    named = r"^rank 1 on \S+ \(process \d+\): its process was killed, or left; in step 5, forward pass, rank "
    assert re.search(named, output, re.MULTILINE), output
    wait_for(lambda: program.left() == {}, "the end of all")


@pytest.mark.parametrize("fault", ["evaluation", "hook", "save"])
def test_work_between_steps_may_take_longer_than_a_step(spawn: Spawn, tmp_path: Path, fault: str) -> None:
    program = start(spawn, tmp_path, fault, 0)
    assert (program.end(), program.output()) == (0, "")


def test_work_between_steps_that_takes_too_long_names_its_own_flag(spawn: Spawn, tmp_path: Path) -> None:
    program = start(spawn, tmp_path, "stuck", 0)
    assert program.end() == EXIT_CODE_RESTART, program.output()
    assert "no progress for 2 s (--distributed-timeout-minutes; raise it" in program.output()
    assert "--rank-heartbeat-timeout" not in program.output()


def test_work_that_goes_on_is_progress_and_begins_no_phase() -> None:
    beacon, begun = Beacon(), list[Phase]()
    beacon.mark(Phase.CHECKPOINT)
    beacon.observer = begun.append
    marks = beacon.read()[0].marks
    beacon.goes_on(Phase.CHECKPOINT)
    beacon.goes_on(Phase.EVALUATION)
    assert beacon.read()[0].marks == marks + 1
    assert not begun, "a checkpoint's own thread has no part in the times of a step"
