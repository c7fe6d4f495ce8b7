"""`python`, `nexus` and `deepspeed` for the shells and batch systems of tests, with all imports done.

`warm_bin()` is a folder for the front of a PATH. Its programs are small clients (`warm_client.py`): each
hands its arguments, folder, environment and descriptors to a server, which forks a process that runs the
program with all imports done. Signals are passed on, the exit code is the program's, and the program ends
with its client. Its parent is not the client: tests of what looks for its parents start a cold interpreter.
"""

import atexit
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from megatron_nexus.parallel.local_ranks import die_with_parent
from tests.support.paths import REPOSITORY
from tests.support.waiting import wait_for
from tests.support.warm_client import ANSWER_BYTES
from tests.support.warm_server import EXECUTABLE, WarmProcess, become

CLIENT = Path(__file__).with_name("warm_client.py")
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_HEADER_BYTES = 8
_MOST_DESCRIPTORS = 64
_ABOVE_ALL = 500
"""Received descriptors wait here for their places."""


@cache
def warm_bin() -> Path:
    """Return the folder of the programs, made at first use; it and their server end with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))  # a socket's path has room for 107 bytes
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numbers = [getattr(signal, name).value for name in _SIGNALS]
    settings = {"python": sys.executable, "header_bytes": _HEADER_BYTES, "signals": numbers}
    (folder / "settings.json").write_text(json.dumps(settings))
    interpreter = os.path.realpath(sys.executable)
    for name in ("python", "nexus", "deepspeed"):
        (folder / name).write_text(f"#!{interpreter} -IS\n{CLIENT.read_text()}")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = ["-m", "tests.support.warm_programs", str(folder)]
    server = WarmProcess(words, folder, environment, folder / "log")
    atexit.register(server.kill)  # else this process would wait for its end
    wait_for((folder / "socket").exists, "the server of warm programs")
    return folder


def warm_path() -> str:
    """Return a PATH with the warm programs before all others of this Python."""
    return f"{warm_bin()}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def _serve(folder: Path) -> None:
    """Fork a process for each client, for ever; return in the process that is to run a program."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "new"))
        listener.listen(64)
        (folder / "new").rename(folder / "socket")
        while True:
            client, _ = listener.accept()
            if not os.fork():
                listener.close()
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    header, descriptors, _, _ = socket.recv_fds(client, _HEADER_BYTES, _MOST_DESCRIPTORS)
    message = b""
    while len(message) < int.from_bytes(header, "big"):
        message += client.recv(65536)
    told = json.loads(message)
    program = os.fork()
    if program:
        _watch(client, program)
    client.close()
    die_with_parent()
    os.setsid()
    waiting = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _ABOVE_ALL) for descriptor in descriptors]
    for descriptor, place in zip(waiting, told["descriptors"], strict=True):
        os.dup2(descriptor, place)
        os.close(descriptor)
    environment = {EXECUTABLE: str(folder / "python"), **told["environment"]}
    become(told["words"], Path(told["cwd"]), environment, told["name"])


def _watch(client: socket.socket, program: int) -> NoReturn:
    """Pass the client's signals on to the program, end it with the client, and answer with its exit code."""
    ended = os.pidfd_open(program)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            with suppress(OSError):
                client.sendall(code.to_bytes(ANSWER_BYTES, "big", signed=True))
            os._exit(0)
        numbers = client.recv(64)
        for number in numbers or [signal.SIGKILL]:
            os.kill(program, number)
        if not numbers:
            select.select([ended], [], [])


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
