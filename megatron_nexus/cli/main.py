"""The command `nexus`: it imports the module of the verb that it is called with, and runs it.

    nexus train --tp 2 --pp 2               python -m megatron_nexus train --tp 2 --pp 2

Files such as `pretrain_nexus.py` call `main` with the verb that they stand for.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_nexus import __version__
from megatron_nexus.base.invocation import COMMAND
from megatron_nexus.base.linux import require_linux
from megatron_nexus.cli.verbs import VERBS, overview
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, ConfigError


def main(verb: str | None = None) -> NoReturn:
    """Run `verb`, or the one that the command line names first, and end the process."""
    try:
        require_linux()
    except ConfigError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(EXIT_CODE_USER_ERROR)
    argv = sys.argv[1:]
    if verb is None:
        verb, argv = _split(argv)
    # Until the verb itself listens, Ctrl-C ends the process at once: there is nothing to save.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    run: Callable[..., None] = importlib.import_module(f"megatron_nexus.cli.{VERBS[verb].module}").run
    if verb in ("train", "unlearn", "retrieve"):  # which end the process, after handling signals and errors
        run(argv, verb)
    from megatron_nexus.cli.runner import run_tool

    signal.signal(signal.SIGINT, interrupt)
    run_tool(lambda: run(argv))


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Return the verb of a command line and what is left of it; end the process where there is none."""
    at = 0
    while argv[at:] and argv[at].startswith(("--local_rank", "--local-rank")):
        at += 1  # DeepSpeed's and torch's launchers put it first
    word = argv[at] if argv[at:] else "--help"
    if word in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        sys.exit(0)
    if word == "--version":
        sys.stdout.write(f"megatron_nexus {__version__}\n")
        sys.exit(0)
    if word in VERBS:
        return word, argv[:at] + argv[at + 1 :]
    if word.startswith("-"):
        remedy = f"a verb comes first, such as {COMMAND} train {word}"
    else:
        near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.4)
        meant = f"did you mean {COMMAND} {near[0]}? " if near else ""
        remedy = f"{meant}{COMMAND} --help lists all verbs"
    sys.stderr.write(f"ConfigError: {ConfigError(f'{word!r} is not a verb: {remedy}')}\n")
    sys.exit(2)
