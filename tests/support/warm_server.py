"""Python programs in processes of their own without the seconds of their imports.

A server imports torch, DeepSpeed and this package once and forks a process for each program. To the program
it is a real process: its own environment, folder, standard streams, session, signals and exit code. Only what
happens before its first line differs: tests of that start a cold interpreter.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

from megatron_nexus.parallel.local_ranks import die_with_parent
from tests.support.paths import REPOSITORY

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.support.preload"])
_SERVER_ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

EXECUTABLE = "NEXUS_TEST_EXECUTABLE"
"""The variable with the interpreter that a warm process starts its own processes with, if not its own."""


class WarmProcess:
    """A forked process that runs `python WORDS`, with what tests use of `subprocess.Popen`.

    Args:
        words: a script or `-m` and a module, then its flags.
        cwd: the folder to run in.
        environment: all its variables.
        output: the file to which stdout and stderr are appended.
    """

    def __init__(self, words: Sequence[str], cwd: Path, environment: Mapping[str, str], output: Path) -> None:
        self.args = [sys.executable, *words]
        output.touch()
        self._process = _SERVER.Process(target=_run, args=(list(words), cwd, dict(environment), output))
        with mock.patch.dict(os.environ, _SERVER_ENVIRONMENT):  # the server's, where this starts it
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.sentinel: int = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to a process that still runs."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(words: list[str], cwd: Path, environment: dict[str, str], output: Path) -> None:
    die_with_parent()
    os.setsid()
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    become(words, cwd, environment)


def become(words: list[str], cwd: Path, environment: Mapping[str, str], name: str | None = None) -> None:
    """Run `python WORDS` in this process, which has its session and streams already.

    `name` is that by which a script was started, if not its own.
    """
    heed_terminal_keys()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment.get(EXECUTABLE, sys.executable)
    sys.orig_argv = [sys.executable, *words]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name or words[0], *words[1:]]
        sys.path.insert(0, str(Path(words[0]).resolve().parent))  # as Python does, and run_path does not
        runpy.run_path(words[0], run_name="__main__")


def call_in_fork(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a forked process; where it fails, end as it did.

    What a case of several in one process leaves behind ends with it: DeepSpeed's engines and gloo's threads,
    four of which a group look a hundred times a second for something to do.
    """
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function, arguments))
    process.start()
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        os.kill(os.getpid(), -process.exitcode)
    if process.exitcode:
        sys.exit(process.exitcode)


def _call(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    die_with_parent()
    function(*arguments)


def heed_terminal_keys() -> None:
    """Heed Ctrl-C, Ctrl-\\ and a closed terminal, which `&` and nohup have all ignore that they start."""
    for key in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(key, signal.SIG_DFL)
