"""Run a program on a host of a test: on_host.py PID [NAME=VALUE ...] SCRIPT [FLAGS].

Forked from the warm server. PID holds the host; the variables are what a launcher would give the rank.
"""

import os
import runpy
import sys

from tests.hosts.network import enter


def main() -> None:
    """Move to the host and become the program."""
    pid, *words = sys.argv[1:]
    enter(int(pid))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
