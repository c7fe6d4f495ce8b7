"""Arguments that several tools have, and the types of their values."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_nexus.config.config_field import MOST
from megatron_nexus.data.input_files import ENDINGS


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what text to read: --input, --json-keys, --txt-documents."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help=f"files, folders and globs of {ENDINGS}",
    )
    parser.add_argument(
        "--json-keys",
        action=_OneKey,
        nargs="+",
        default="text",
        metavar="KEY",
        help="field of JSON records and column of parquet files that holds the text, doc.text for one within "
        "another (default: text)",
    )
    parser.add_argument(
        "--txt-documents",
        choices=("file", "line"),
        default="file",
        help="what a document is in .txt files (default: file)",
    )


class _OneKey(argparse.Action):
    """Megatron-LM's flag takes several keys; here one is taken, and more are answered."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        assert values is not None and not isinstance(values, str), "nargs is +"
        if len(values) > 1:
            raise argparse.ArgumentError(
                self,
                f"{len(values)} keys, and a corpus is of one: run once for each, with an output of its own, "
                "and blend the corpora with --data-path; or join the fields in the records",
            )
        setattr(namespace, self.dest, values[0])


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Return a parser of numbers above 0."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse calls an invalid value by it
    return parse


def not_negative(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Return a parser of finite numbers from 0 on."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is below 0 or infinite")
        return value

    parse.__name__ = kind.__name__
    return parse


def fraction(text: str) -> float:
    """Return a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def count(text: str) -> int:
    """Return a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{text} must be at most 2**48 ({MOST:,})")
    return value


def prefix(text: str) -> Path:
    """Return the prefix of a corpus: what the names of its files have in common."""
    if text.endswith("/") or not Path(text).name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a folder: add a name, such as {text.rstrip('/')}/corpus"
        )
    return Path(text)
