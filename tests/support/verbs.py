"""Verbs of the command in the process of a test: the type of the fixture `call_verb`."""

from typing import Protocol


class CallVerb(Protocol):
    """Runs a verb with the words of its command line; returns its exit code, and what it printed.

    `started`: the program that the process is, which messages repeat.
    """

    def __call__(self, verb: str, words: str | list[object], started: str = "nexus") -> tuple[int, str]: ...
