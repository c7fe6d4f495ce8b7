"""The client of `warm_programs`, on its own: it knows no package, and starts in milliseconds."""

import json
import os
import signal
import socket
import sys
from types import FrameType

ANSWER_BYTES = 4


def words_of(name: str, given: list[str], python: str) -> list[str]:
    """Return what follows `python` in this program's command line; run what a server cannot fork."""
    if name != "python":
        return [os.path.join(os.path.dirname(python), name), *given]  # noqa: PTH118, PTH120 - pathlib is slow
    while given[:1] == ["-u"]:
        given = given[1:]
    if given[:1] != ["-m"] and not given[0].endswith(".py"):
        os.execv(python, [python, *given])
    return given


def is_given(descriptor: int) -> bool:
    """Return whether a descriptor came with the start of this process."""
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False


def main() -> None:
    """Have the server run a program; pass signals on, and end as it does."""
    here, name = os.path.split(os.path.abspath(sys.argv[0]))  # noqa: PTH100
    with open(os.path.join(here, "settings.json")) as file:  # noqa: PTH118
        settings = json.load(file)
    words = words_of(name, sys.argv[1:], settings["python"])
    descriptors = [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_given(fd)]  # noqa: PTH208
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(here, "socket"))  # noqa: PTH118

    def pass_on(number: int, frame: FrameType | None) -> None:
        server.send(bytes([number]))

    told = {
        "words": words,
        "name": None if name == "python" else os.path.join(here, name),  # noqa: PTH118
        "cwd": os.getcwd(),  # noqa: PTH109
        "environment": dict(os.environ),
        "descriptors": descriptors,
    }
    message = json.dumps(told).encode()
    socket.send_fds(server, [len(message).to_bytes(settings["header_bytes"], "big")], descriptors)
    server.sendall(message)
    for number in settings["signals"]:
        signal.signal(number, pass_on)
    answer = server.recv(ANSWER_BYTES)
    code = int.from_bytes(answer, "big", signed=True) if answer else 1
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
