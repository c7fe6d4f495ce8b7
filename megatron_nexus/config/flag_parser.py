"""A command line whose complaints say what to change: one error, no usage, the nearest flag by name."""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from megatron_nexus import __version__
from megatron_nexus.base.invocation import command
from megatron_nexus.errors import ConfigError

NEAR = 0.7
"""How alike two names are of which one is the other misspelt: below, advice would be absurd."""

_READ, _WRITTEN = ("load", "checkpoint", "model", "run"), ("save", "output", "output-dir", "output-prefix")
"""Names under which verbs take what they read and what they write."""


class HelpFormatter(argparse.HelpFormatter):
    """Help that calls a flag's value by its type, such as INT."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return str(getattr(action.type, "__name__", action.dest)).upper()


class FlagParser(argparse.ArgumentParser):
    """argparse that raises ConfigError."""

    replacement_hint: Callable[[str], str | None] = staticmethod(lambda flag: None)
    """What to do in place of a flag that is known from elsewhere."""

    family_hint: Callable[[str], str | None] = staticmethod(lambda flag: None)
    """The same for a flag of a family known from elsewhere, unless it is a flag of ours misspelt."""

    def __init__(self, verb: str | None = None, synopsis: str = "", **kwargs: Any) -> None:
        """Make the parser of a verb; `synopsis` follows its name in the usage line. Without: has no help."""
        name = command(verb) if verb else None
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(name, f"{name} {synopsis}", allow_abbrev=False, add_help=verb is not None, **kwargs)
        if verb is None:
            return
        version = f"megatron_nexus {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version and exit")

    def add_flag(self, names: str, text: str, **kwargs: Any) -> None:
        """Add a flag, of one name or of several with spaces between; the rest is as for `add_argument`."""
        self.add_argument(*names.split(), help=text, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError; what is wrong with one flag is followed by what that flag takes."""
        _, _, text = message.partition("argument ")
        action = self._option_string_actions.get(text.split("/")[0].split(":")[0])
        if action is None:
            raise ConfigError(f"{message}{self._see_help}")
        if "choose from" in text:
            raise ConfigError(text)
        if "not allowed with" in text:
            raise ConfigError(f"{text}: drop one of the two")
        value = action.metavar or self._get_formatter()._get_default_metavar_for_optional(action)
        raise ConfigError(f"{text}: give {action.option_strings[-1]} {value}{self._see_help}")

    def parse_args(  # type: ignore[override]  # no namespace of the caller's
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Return the values of all flags. Raises ConfigError."""
        words = sys.argv[1:] if args is None else list(args)
        # First of all: a required flag that is missing may be one that is misspelt.
        flags = [word for word in takewhile(lambda word: word != "--", words) if word.startswith("--")]
        unknown = [word for word in flags if word.split("=")[0] not in self._option_string_actions]
        if unknown:
            raise ConfigError([self._unknown(word) for word in unknown])
        known, strays = self.parse_known_args(words)
        if strays:
            raise ConfigError(
                [
                    self._unknown(word)
                    if word.startswith("-")
                    else f"{word!r} belongs to no flag: drop it, or name its flag{self._see_help}"
                    for word in strays
                ]
            )
        return known

    def _unknown(self, word: str) -> str:
        flag = word.split("=")[0]
        # By their names alone: the dashes would make any two flags alike.
        names = {
            flag.lstrip("-"): flag
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for flag in action.option_strings
        }
        near = difflib.get_close_matches(flag.strip("-").replace("_", "-"), names, n=1, cutoff=NEAR)
        meant = f"did you mean {names[near[0]]}?" if near else self.family_hint(flag)
        hint = (
            self.replacement_hint(flag) or self._synonym(flag, names) or meant or f"drop it{self._see_help}"
        )
        return f"unknown flag {word}: {hint}"

    def _synonym(self, flag: str, names: Mapping[str, str]) -> str | None:
        """Return what this verb takes in place of another verb's flag for the same."""
        name = flag.strip("-").replace("_", "-")
        if name in ("model", "model-name", "model-name-or-path") and "preset" in names:
            return "use --preset with the name of a preset, or --load with a checkpoint"
        group = next((group for group in (_READ, _WRITTEN) if name in group), ())
        if found := [names[other] for other in group if other in names]:
            return f"use {found[0]}"
        words = [action for action in self._actions if not action.option_strings]
        return (
            f"give {words[0].metavar or words[0].dest} without a flag" if group == _READ and words else None
        )

    @property
    def _see_help(self) -> str:
        return f"; see {self.prog} --help" if self.add_help else ""
