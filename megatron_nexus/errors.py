"""The errors a user can fix: each message names the value, the rule it breaks and the remedy.

The command lines print them without a traceback and exit with code 2. A broken invariant of our own
is an `assert`, never one of these.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_RESTART = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, the same one continues the run."""
SHOWN_CHARACTERS = 100
_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name, of at most 255 bytes between two slashes",
    errno.ENOENT: "give one that exists",
    errno.EACCES: "give one that may be read and written, or change its permissions",
    errno.EPERM: "give one that may be read and written, or change its permissions",
    errno.EROFS: "give one on a disk that can be written",
    errno.ENOSPC: "free some space, or give one on another disk",
    errno.EDQUOT: "free some space, or give one on another disk",
    errno.ENOTDIR: "a part of it is a file: give another",
    errno.EISDIR: "add the name of a file",
    errno.ELOOP: "its links lead to themselves: give another",
}


class NexusError(Exception):
    """Base of every error that the user can fix."""

    exit_code = EXIT_CODE_USER_ERROR


class ConfigError(NexusError):
    """The configuration contradicts itself, the machine or the world size.

    All problems are reported at once: one per line, each with its remedy.
    """

    def __init__(self, problems: str | list[str]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise ConfigError with all problems, if there are any."""
    if found := list(problems):
        raise ConfigError(found)


class RefusedError(ConfigError):
    """A rank of another machine was refused; what it said is the problem."""


class DataError(NexusError):
    """A corpus, an index or a tokenizer cannot be used."""


class CheckpointError(NexusError):
    """A checkpoint is missing, incomplete, damaged or of another model."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or not as it was written: another checkpoint of the run may be."""


class TrainingError(NexusError):
    """Training cannot go on: a loss or a gradient is no longer finite, or another rank has failed."""


class RestartError(NexusError):
    """A rank, a machine or the network has failed: the same command continues from the last checkpoint."""

    exit_code = EXIT_CODE_RESTART


@contextmanager
def path_errors() -> Iterator[None]:
    """Raise ConfigError for an error of a file or folder that nothing else answers: commands run in this."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise  # of no file: the network, a pipe
        raise path_error(error, sys.argv[1:]) from error


def try_all(*steps: Callable[[], Any]) -> list[Any]:
    """Return what independent steps return.

    Raises what one of them raises, or ConfigError with the problems of several.
    """
    found: list[Any] = []
    errors: list[NexusError] = []
    for step in steps:
        try:
            with path_errors():
                found.append(step())
        except NexusError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    said = (error.problems if isinstance(error, ConfigError) else [str(error)] for error in errors)
    raise_problems(problem for problems in said for problem in problems)
    return found


@contextmanager
def flag_errors(flag: str, path: object) -> Iterator[None]:
    """Raise ConfigError for an OSError of a file that a flag names, whatever the system calls the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {_reason(error)}") from error


@contextmanager
def os_errors_as(kind: type[NexusError], what: object, remedy: str) -> Iterator[None]:
    """Raise an error of `kind` for an OSError: `what` failed, why, and the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}: {remedy}") from error


def path_error(error: OSError, words: Sequence[str]) -> ConfigError:
    """Return what is wrong with a path, by the flag of `words`, a command line, that it was given with."""
    path = str(error.filename) if isinstance(error.filename, int) else os.fsdecode(error.filename)
    more = f"... ({len(path)} characters)" if len(path) > SHOWN_CHARACTERS else ""
    return ConfigError(f"{_flag_of(path, words)}{path[:SHOWN_CHARACTERS]}{more}: {_reason(error)}")


def _reason(error: OSError) -> str:
    """Return why, and the remedy."""
    return f"{error.strerror or error}: {_REMEDIES.get(error.errno or 0, 'give another')}"


def _flag_of(path: str, words: Sequence[str]) -> str:
    """Return the flag with the longest value that a path begins with, and a space; "" where there is none."""
    found, longest, flag = "", 0, ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
        else:
            value = word
        value = os.path.normpath(value.rpartition("=")[2]) if value else ""
        named = (value, f"{Path.cwd()}/{value}")
        below = tuple(f"{name}{sign}" for name in named for sign in "/.")  # of a prefix: corpus.bin
        if len(value) > longest and (path in named or path.startswith(below)):
            found, longest = flag, len(value)
    return f"{found} " if found else ""
