"""Programs that tests start in processes of their own, and the law that none of them is left behind."""

import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY
from tests.support.waiting import TIMEOUT_S

MARK = "NEXUS_TEST_PROGRAM"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {TIMEOUT_S:.0f} s:\n{self.output()[-4000:]}") from None

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


def spawner(logs: Path) -> Iterator[Spawn]:
    """For the body of a fixture: yield a function that starts a command; at the end nothing of it lives."""
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
