"""Programs that tests start in processes of their own, and the law that none of them is left behind."""

import gc
import os
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import PATIENCE_S, REPOSITORY

from megatron_nexus.log import logger

pytest_plugins = ["judged"]  # fixtures of evaluation; a second conftest.py would take this one's name

gc.set_threshold(100_000)  # thousands of modules live here, none of them garbage
MARK = "NEXUS_TEST_PROGRAM"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: the long tests are theirs, and one that begins last leaves a core idle."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """The package's console, to be set up by the test; afterwards the logger is what it was."""
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield capsys
    logger.handlers[:], logger.level, logger.propagate = before


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds; fails with `what` where it does not come true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(0.02)


def as_in_a_terminal() -> None:
    """Heed the keys of a terminal, which a shell has all ignore that it starts in the background."""
    for key in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(key, signal.SIG_DFL)


@dataclass
class Program:
    """A started command and all that descends from it, which a mark in the environment tells apart."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    def output(self) -> str:
        """What all its processes have written so far, stdout and stderr."""
        return self.log.read_text(errors="replace")

    def end(self) -> int:
        """Wait for the started process and return its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {PATIENCE_S:.0f} s:\n{self.output()[-4000:]}"
            ) from None

    def interrupt(self) -> None:
        """Ctrl-C in a terminal: SIGINT to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def left(self) -> dict[int, str]:
        """The processes that still live, with their command lines."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return {pid: command for pid in pids if (command := self._command_of(pid))}

    def _command_of(self, pid: int) -> str:
        folder = Path(f"/proc/{pid}")
        try:
            if f"{MARK}={self.mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                return ""
            return (folder / "cmdline").read_text().replace("\0", " ")  # empty once it is a zombie
        except OSError:  # it ended while we looked
            return ""


Spawn = Callable[[list[str], Path], Program]


@pytest.fixture
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Start a command in a folder, in a session of its own; at the end of the test nothing of it lives."""
    yield from spawner(tmp_path_factory.mktemp("logs"))


def spawner(logs: Path) -> Iterator[Spawn]:
    """What `spawn` is, for fixtures of another scope."""
    programs: list[Program] = []

    def spawn(command: list[str], cwd: Path) -> Program:
        mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        environment |= {"PYTHONPATH": str(REPOSITORY), MARK: mark}
        with (logs / mark).open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=as_in_a_terminal,
            )
        programs.append(Program(process, mark, logs / mark))
        return programs[-1]

    yield spawn
    for program in programs:
        for pid in program.left():
            os.kill(pid, signal.SIGKILL)
        program.process.kill()
        program.process.wait()
