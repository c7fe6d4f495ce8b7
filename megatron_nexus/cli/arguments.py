"""Arguments that several tools have, and the types of their values."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import inf
from pathlib import Path
from typing import TypeVar

from megatron_nexus.checkpoint.location import SCHEME, Location
from megatron_nexus.config.config_field import MOST
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.documents import RecordFormat
from megatron_nexus.data.input_files import ENDINGS
from megatron_nexus.errors import ConfigError, flag_errors

T = TypeVar("T", int, float)


def add_reading_arguments(parser: FlagParser) -> None:
    """Add the flags that say what text to read: --input, --json-keys, --txt-documents."""
    flag = parser.add_flag
    flag("--input", f"files, folders and globs of {ENDINGS}", required=True, nargs="+", metavar="PATH")
    flag(
        "--json-keys",
        "field of JSON records and column of parquet files that holds the text, doc.text for one within "
        "another (default: text)",
        nargs="+",
        default=["text"],
        metavar="KEY",
    )
    text = "what a document is in .txt files (default: file)"
    flag("--txt-documents", text, choices=("file", "line"), default="file")


def record_format(given: argparse.Namespace) -> RecordFormat:
    """Return where the text of a record is. Raises ConfigError: Megatron-LM's flag takes several keys."""
    if len(given.json_keys) > 1:
        raise ConfigError(
            f"--json-keys: {len(given.json_keys)} keys, and a corpus is of one: run once for each, with an "
            "output of its own, and blend the corpora with --data-path; or join the fields in the records"
        )
    return RecordFormat(given.json_keys[0], given.txt_documents)


def number(kind: type[T], rule: str, holds: Callable[[T], bool]) -> Callable[[str], T]:
    """Return a parser of numbers for which `holds` is true, as `rule` says."""

    def parse(text: str) -> T:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} must {rule}")
        return value

    parse.__name__ = kind.__name__  # argparse calls an invalid value by it
    return parse


def positive(kind: type[T]) -> Callable[[str], T]:
    """Return a parser of numbers above 0."""
    return number(kind, "be a finite number above 0", lambda value: 0 < value < inf)


fraction = number(float, "be above 0 and at most 1", lambda value: 0 < value <= 1)
not_negative = number(float, "be a finite number, 0 or above", lambda value: 0 <= value < inf)
count = number(int, f"lie between 0 and 2**48 ({MOST:,})", lambda value: 0 <= value <= MOST)


def folder_on_disk(flag: str, text: str, source: Location) -> Path:
    """Return the folder that a flag names for a result.

    Raises ConfigError: it is in an object store, or in the source, which is never touched.
    """
    if SCHEME in text:
        raise ConfigError(f"{flag} {text} is not a folder on this disk: give one, and copy it")
    folder = Path(text)
    if source.resolve() in [folder.resolve(), *folder.resolve().parents]:
        raise ConfigError(
            f"{flag} {folder} lies in the source {source}, which is never touched: give another"
        )
    return folder


def given_twice(runs: Iterable[str]) -> list[str]:
    """Return what is wrong with runs that are given more than once."""
    return [f"{run} is given twice: give each run once" for run, times in Counter(runs).items() if times > 1]


def output_problems(flag: str, path: Path | None, is_folder: bool = False) -> Iterator[str]:
    """Yield why a file or a folder that a flag names cannot be written; nothing where none is named."""
    if path is None:
        return
    absolute = path.resolve()
    if path.exists() and path.is_dir() != is_folder:
        yield f"{flag} {path} is a {'file: give a folder' if is_folder else 'folder: add the name of a file'}"
        return
    within = (absolute, *absolute.parents) if is_folder else absolute.parents
    folder = next(place for place in within if place.exists())
    if not folder.is_dir():
        yield f"{flag} {path}: {folder} is a file: give another"
    elif not is_folder and folder != absolute.parent:
        yield f"{flag} {path}: its folder does not exist: make it, or give another"
    elif not os.access(folder, os.W_OK):
        yield f"{flag} {path}: {folder} cannot be written to: give another"


def read_text(flag: str, path: Path) -> str:
    """Return the text of a file that a flag names, its line ends as they are. Raises ConfigError."""
    try:
        with flag_errors(flag, path):
            text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not UTF-8 text ({error}): convert it, or give another"
        ) from error
    if not text:
        raise ConfigError(f"{flag} {path} is empty: give a file with text")
    return text


def prefix(text: str) -> Path:
    """Return the prefix of a corpus: what the names of its files have in common."""
    if text.endswith("/") or not Path(text).name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a folder: add a name, such as {text.rstrip('/')}/corpus"
        )
    return Path(text)
