"""A rank whose launcher has ended is asked to stop, whichever process above it that was."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.subprocesses import Spawn
from tests.support.waiting import wait_for

# Real chains: the command, its launcher for this machine, the rank.
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
RANK = """
import os, signal, time
from pathlib import Path
from megatron_nexus import log
from megatron_nexus.parallel.launcher_watch import ancestors, stop_without_launcher
log.configure(is_main_rank=True)
def stop(number, frame):
    os.write(1, f"saved at {signal.Signals(number).name}".encode())
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
stop_without_launcher(signal.SIGTERM)
Path("found").write_text(" ".join(f"{p.program or '-'}:{p.pid}" for p in ancestors()))
Path("found").rename("ready")
time.sleep(600)
"""


@pytest.mark.law
@pytest.mark.parametrize(
    ("chain", "victim", "number"),
    [
        (["deepspeed", "-u deepspeed.launcher.launch"], "deepspeed", signal.SIGTERM),
        (["deepspeed", "-u deepspeed.launcher.launch"], "deepspeed", signal.SIGUSR1),
        (["deepspeed", "-u deepspeed.launcher.launch"], "deepspeed.launcher.launch", signal.SIGKILL),
        (["torchrun", "wrapper.py"], "torchrun", signal.SIGKILL),
        (["mpirun"], "mpirun", signal.SIGKILL),
    ],
)
def test_a_rank_whose_launcher_ended_stops(
    tmp_path: Path, spawn: Spawn, chain: list[str], victim: str, number: signal.Signals
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = [word for link in chain for word in link.split()]
    for name in words:
        (tmp_path / name).write_text(PARENT)
    program = spawn([sys.executable, *words, "rank.py"], tmp_path)
    wait_for((tmp_path / "ready").exists, "a rank that watches")
    found = [word.split(":") for word in (tmp_path / "ready").read_text().split()]
    pid = next(int(pid) for name, pid in found if name == victim)
    os.kill(pid, number)
    wait_for(
        lambda: "which started this run, is gone: stopping\nsaved at SIGTERM" in program.output(), "a save"
    )
    assert f"{victim} (process {pid}), which started this run, is gone" in program.output()
    wait_for(lambda: program.left() == {}, "the end of all")
