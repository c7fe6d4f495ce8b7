"""Local ranks live and die together: real processes, and none is left behind."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_nexus.config.exit_signals import DEFAULT_EXIT_SIGNALS, parse_exit_signals
from megatron_nexus.parallel.local_ranks import _watch, missing_ranks
from megatron_nexus.parallel.world import World
from tests.support.cases import first_by_default
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Program, Spawn
from tests.support.waiting import scaled_by_load, wait_for

# Runs its arguments as local ranks: `python -c PARENT count script ...`.
PARENT = """
import sys
from megatron_nexus import log
from megatron_nexus.parallel.local_ranks import run_local_ranks
log.configure(is_main_rank=True)
sys.exit(run_local_ranks(int(sys.argv[1]), sys.argv[2:]))
"""
# What every rank script begins with; `ready` tells the test that the rank is listening.
PROLOGUE = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def ready():
    Path(f"starting_{rank}").write_text(str(os.getpid()))
    Path(f"starting_{rank}").rename(f"ready_{rank}")
"""


@dataclass
class Run:
    """A parent with its ranks, in a folder of their own."""

    folder: Path
    program: Program

    def end(self) -> tuple[int, str]:
        """Wait for the parent: its exit code and all output; no process of it is left."""
        code = self.program.end()
        assert self.program.left() == {}
        return code, self.program.output()

    def await_ready(self, count: int) -> list[int]:
        """The process ids of the ranks, once all of them are ready."""
        files = [self.folder / f"ready_{rank}" for rank in range(count)]
        wait_for(lambda: all(file.exists() for file in files), "ranks that are ready")
        return [int(file.read_text()) for file in files]


Start = Callable[[int, str], Run]


@pytest.fixture
def start(tmp_path: Path, spawn: Spawn) -> Start:
    """Start a script as local ranks."""

    def start(count: int, script: str) -> Run:
        (tmp_path / "rank.py").write_text(PROLOGUE + script)
        command = [sys.executable, "-c", PARENT, str(count), "rank.py", "--flag", "two words"]
        return Run(tmp_path, spawn(command, tmp_path))

    return start


def test_every_rank_gets_its_place_the_command_and_a_share_of_the_cores(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = start(
        3,
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS'.split()\n"
        "os.write(1, (' '.join(os.environ[n] for n in names) + ' | ' + ' '.join(sys.argv) + '\\n').encode())",
    )
    code, output = run.end()
    assert code == 0
    lines = [line.split() for line in sorted(output.splitlines())]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    port = lines[0][5]
    assert int(port) > 1023
    tail = ["3", "3", "127.0.0.1", port, threads, "|", "rank.py", "--flag", "two", "words"]
    assert lines == [[rank, rank, *tail] for rank in "012"]


@pytest.mark.parametrize("code", [1, *(pytest.param(code, marks=pytest.mark.law) for code in (2, 77))])
def test_the_exit_code_is_that_of_the_first_to_fail(start: Start, code: int) -> None:
    # Rank 2 fails; once the parent has seen it the others follow with another code, as ranks that lost a
    # peer do.
    run = start(
        3,
        "if rank == 2:\n"
        "    ready()\n"
        f"    sys.exit({code})\n"
        "while not Path('ready_2').exists() or Path('/proc', Path('ready_2').read_text()).exists():\n"
        "    time.sleep(0.02)\n"
        "sys.exit(5)",
    )
    assert run.end()[0] == code


@pytest.mark.slow
def test_when_one_rank_fails_those_that_hang_are_ended_within_ten_seconds(start: Start) -> None:
    run = start(
        3,
        "for number in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(number, signal.SIG_IGN)\n"
        "ready()\n"
        "while rank == 1 and not all(Path(f'ready_{r}').exists() for r in range(3)): time.sleep(0.02)\n"
        "sys.exit(3) if rank == 1 else time.sleep(600)",
    )
    run.await_ready(3)
    began = time.monotonic()
    assert run.end()[0] == 3
    assert time.monotonic() - began < scaled_by_load(10.0)


@pytest.mark.law
def test_a_killed_rank_is_named_and_ends_the_run(start: Start) -> None:
    run = start(2, "ready(); time.sleep(0.5 if rank == 0 else 600)")
    os.kill(run.await_ready(2)[1], signal.SIGKILL)
    code, output = run.end()
    assert code == 128 + signal.SIGKILL
    assert output == "rank 1 was terminated by SIGKILL: out of memory, or killed manually?\n"


def test_of_ranks_that_end_together_the_killed_one_is_the_first(caplog: pytest.LogCaptureFixture) -> None:
    """The others leave because of it, within the same look at them."""
    words = ("raise SystemExit(75)", "import os; os.kill(os.getpid(), 9)")
    ranks = [subprocess.Popen([sys.executable, "-c", word]) for word in words]
    for rank in ranks:
        rank.wait()
    with caplog.at_level(logging.ERROR):
        assert _watch(ranks, []) == 128 + signal.SIGKILL
    assert "rank 1 was terminated by SIGKILL" in caplog.text


def test_a_rank_whose_data_file_is_cut_short_is_reported_with_that_cause(start: Start) -> None:
    run = start(
        1,
        "import mmap\nPath('corpus.bin').write_bytes(bytes(8192))\nfile = open('corpus.bin', 'r+b')\n"
        "pages = mmap.mmap(file.fileno(), 0)\nfile.truncate(0)\npages[5000]\n",
    )
    code, output = run.end()
    assert code == 128 + signal.SIGBUS
    assert output == (
        "rank 0 was terminated by SIGBUS: a data file was cut short while it was read, or /dev/shm is full?\n"
    )


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=() if number == signal.SIGTERM else pytest.mark.law)
        for number in parse_exit_signals(DEFAULT_EXIT_SIGNALS)
    ],
)
def test_signals_are_passed_on_and_heeded_ones_are_no_failure(start: Start, number: signal.Signals) -> None:
    run = start(
        2,
        "caught = []\n"
        f"signal.signal({int(number)}, lambda n, frame: caught.append(n))\n"
        "ready()\n"
        "while not caught: time.sleep(0.02)\n"
        "os.write(1, f'rank {rank} heeds {caught[0]}\\n'.encode())",
    )
    run.await_ready(2)
    run.program.process.send_signal(number)  # to the parent alone, as a launcher does
    code, output = run.end()
    assert (code, sorted(output.splitlines())) == (0, [f"rank {r} heeds {int(number)}" for r in range(2)])


def test_a_signal_that_ranks_do_not_heed_yet_ends_them_all_with_one_message(start: Start) -> None:
    run = start(3, "signal.signal(signal.SIGINT, signal.SIG_DFL); ready(); time.sleep(600)")
    run.await_ready(3)
    run.program.interrupt()  # Ctrl-C reaches parent and ranks
    code, output = run.end()
    assert code == 128 + signal.SIGINT
    assert len(output.splitlines()) == 1
    assert "was terminated by SIGINT: the run had not begun to train" in output


@pytest.mark.parametrize("heeds", first_by_default(1, [True, False]))
def test_ranks_are_asked_to_stop_when_their_parent_is_killed(start: Start, heeds: bool) -> None:
    stop = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved '), os._exit(0)))" if heeds else ""
    run = start(2, f"{stop}\nready(); time.sleep(600)")
    run.await_ready(2)
    assert len(run.program.left()) == 3
    run.program.process.kill()
    run.program.process.wait()
    wait_for(lambda: run.program.left() == {}, "the end of the ranks")
    assert run.program.output() == "saved saved " * heeds


@pytest.mark.law
def test_the_ranks_port_is_taken_from_the_start_and_the_first_rank_s_to_serve(start: Start) -> None:
    run = start(
        2,
        "import socket\n"
        "port = int(os.environ['MASTER_PORT'])\n"
        "if rank == 0:\n"
        "    time.sleep(0.5)\n"  # the other calls meanwhile
        "    line = socket.socket(fileno=int(os.environ['MEGATRON_NEXUS_LISTENER'])).accept()[0]\n"
        "else:\n"
        "    line = socket.create_connection(('127.0.0.1', port))\n"
        "    try:\n"
        "        socket.create_server(('127.0.0.1', port))\n"
        "    except OSError:\n"
        "        os.write(1, b'taken')\n"
        "with line:\n"
        "    line.sendall(b'.')\n"
        "    os.write(1, line.recv(1))",
    )
    assert run.end() == (0, "taken..")


def world(launcher: str, size: int = 1) -> World:
    return World(launcher, 0, size, 0, size, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("launcher", "size", "wanted", "missing"),
    [
        ("none", 1, 4, True),
        ("none", 1, 1, False),
        ("deepspeed", 2, 4, False),  # the number was given
        ("torchrun", 1, 4, False),
        ("srun", 1, 4, False),
        ("mpirun", 1, 4, False),
    ],
)
def test_only_a_process_that_nobody_counted_starts_the_ranks_it_lacks(
    launcher: str, size: int, wanted: int, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_nexus.parallel.local_ranks.device_files", lambda: [])
    assert missing_ranks(world(launcher, size), wanted) is missing


def test_on_accelerators_the_launcher_s_count_is_always_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_nexus.parallel.local_ranks.device_files", lambda: ["/dev/nvidia0"])
    assert not missing_ranks(world("none"), 4)


# The chain of a real start: the command `deepspeed`, its launcher for this machine, the training script.
COMMAND = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, 'launch.py', *sys.argv[1:]]))"
SCRIPT = """
from megatron_nexus.parallel import local_ranks
from megatron_nexus.parallel.world import World
local_ranks.device_files = lambda: []
print(local_ranks.missing_ranks(World("deepspeed", 0, 1, 0, 1, "127.0.0.1", 0), 4))
"""


@pytest.mark.parametrize(
    ("words", "missing"),
    first_by_default(
        3,
        [
            ("--master_port 29777 train.py --tp 4", True),
            ("--num_gpus 1 train.py --tp 4", False),
            # After the script they are the script's own.
            ("train.py --num_gpus 1 -i 3", True),
            ("train.py --tp 4", True),
            ("--num_gpus=1 train.py --tp 4", False),
            ("--num_accelerators 1 train.py", False),
            ("--include localhost:0 train.py", False),
            ("-i localhost:0 train.py", False),
            ("-H hosts train.py", False),
        ],
    ),
)
def test_what_the_deepspeed_command_was_told_is_read_from_its_process(
    tmp_path: Path, words: str, missing: bool
) -> None:
    (tmp_path / "deepspeed").write_text(COMMAND)
    (tmp_path / "launch.py").write_text(COMMAND.replace("launch.py", "train.py"))
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "deepspeed", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(missing)
