"""Programs that tests start in processes of their own, and the law that none of them is left behind."""

import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY
from tests.support.waiting import TIMEOUT_S, wait_for
from tests.support.warm_programs import warm_bin
from tests.support.warm_server import EXECUTABLE, WarmProcess, heed_terminal_keys

MARK = "NEXUS_TEST_PROGRAM"
WARM_PYTHON = "python, with all imports done"
"""In the place of an interpreter: the program is forked from the warm server, as are those that it starts."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Program:
    """A started command and all that descends from it, known by a mark in the environment or its session."""

    process: subprocess.Popen[bytes] | WarmProcess
    mark: str
    log: Path

    def output(self) -> str:
        """What all its processes have written so far, stdout and stderr."""
        return self.log.read_text(errors="replace")

    def end(self) -> int:
        """Wait for the started process and return its exit code."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {TIMEOUT_S:.0f} s:\n{self.output()[-4000:]}") from None

    def wait_for_output(self, text: str) -> None:
        """Wait until its output holds `text`; fail where it ends before."""
        wait_for(lambda: text in self.output() or self.process.poll() is not None, f"output {text!r}")
        assert text in self.output(), f"it ended without {text!r}:\n{self.output()[-4000:]}"

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
            marked = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
            if not marked and session != str(self.process.pid):
                return ""
            return (folder / "cmdline").read_text().replace("\0", " ")  # empty once it is a zombie
        except OSError:  # it ended while we looked
            return ""


Spawn = Callable[[list[str], Path], Program]


def spawner(logs: Path) -> Iterator[Spawn]:
    """For the body of a fixture: yield a function that starts a command; at the end nothing of it lives."""
    programs: list[Program] = []

    def spawn(command: list[str], cwd: Path) -> Program:
        mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        environment |= {"PYTHONPATH": str(REPOSITORY), MARK: mark}
        process: subprocess.Popen[bytes] | WarmProcess
        if command[0] == WARM_PYTHON:
            environment[EXECUTABLE] = str(warm_bin() / "python")
            process = WarmProcess(command[1:], cwd, environment, logs / mark)
        else:
            process = _start(command, cwd, environment, logs / mark)
        programs.append(Program(process, mark, logs / mark))
        return programs[-1]

    yield spawn
    for program in programs:
        for pid in program.left():
            os.kill(pid, signal.SIGKILL)
        program.process.kill()
        program.process.wait()


def _start(
    command: list[str], cwd: Path, environment: dict[str, str], output: Path
) -> subprocess.Popen[bytes]:
    with output.open("w") as log:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=heed_terminal_keys,
        )
