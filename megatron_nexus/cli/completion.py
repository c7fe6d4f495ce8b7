"""The verb `completion`: a script by which a shell completes verbs and flags.

    nexus completion bash > ~/.local/share/bash-completion/completions/nexus

shtab writes the script from the parsers, once: the TAB key starts no Python.
"""

import argparse
import importlib
import sys

from megatron_nexus.base.invocation import COMMAND
from megatron_nexus.cli.verbs import VERBS
from megatron_nexus.config.command_line import make_parser as make_train_parser
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser("completion", "SHELL", description="Print a script that completes verbs and flags.")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus completion` with the flags `argv`. Raises ConfigError where shtab is not installed."""
    given = make_parser().parse_args(argv)
    try:
        import shtab
    except ImportError:
        raise ConfigError("the completion script is written by shtab: pip install shtab") from None
    parser = argparse.ArgumentParser(COMMAND)
    verbs = parser.add_subparsers()
    for name, verb in VERBS.items():
        verbs.add_parser(
            name, parents=_parsers(name), add_help=False, conflict_handler="resolve", help=verb.summary
        )
    sys.stdout.write(shtab.complete(parser, given.shell) + "\n")


def _parsers(verb: str) -> list[FlagParser]:
    """Return the parsers of a verb's flags: none of launch, which passes them on; of count two."""
    if verb in ("train", "unlearn", "launch"):
        return [make_train_parser(verb)] if verb != "launch" else []
    made: FlagParser = importlib.import_module(f"megatron_nexus.cli.{VERBS[verb].module}").make_parser()
    return [make_train_parser(), made] if verb in ("count", "compare") else [made]
