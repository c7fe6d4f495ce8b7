"""JSON that others may have written: every way in which a text can be wrong is a ValueError or a TypeError.

Python's own parser raises RecursionError on brackets within brackets, takes 1e400 for infinity, and refuses
numbers of more than 4,300 digits.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megatron_nexus.errors import ConfigError, flag_errors

Record = TypeVar("Record")
MOST_DIGITS = 300
"""More are beyond the numbers that a float can hold."""


class NestingError(ValueError):
    """A text of more brackets within one another than can be read."""

    def __init__(self) -> None:
        super().__init__("nested too deeply")


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says. Raises ValueError, also where a number is beyond those of a float."""
    try:
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise NestingError from None


def parse_record(text: str | bytes) -> Any:
    """Return what a record of data says, numbers of any size in it. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise NestingError from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # not UTF-8, or a number of more digits than int takes
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4300 else float(digits))


def read_object(flag: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that a flag names. Raises ConfigError where it has none."""
    try:
        with flag_errors(flag, path):
            found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{flag} {path} is not JSON ({error}): correct it") from error
    if not isinstance(found, dict):
        raise ConfigError(f'{flag} {path} is not a JSON object: write {{"name": value, ...}}')
    return found


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a file that may be missing, but lines that a crash cut short."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # no JSON, or no UTF-8
            record = parse_record(line)
            if isinstance(record, dict):
                yield record


def record_of(kind: type[Record], raw: object) -> Record:
    """Make a dataclass of parsed JSON. Raises TypeError: a field is missing, unknown or of another type."""
    if not isinstance(raw, dict):
        raise TypeError(f"{raw!r:.80} is not an object")
    return with_types(kind(**raw))


def with_types(record: Record) -> Record:
    """Return a dataclass whose fields came from JSON. Raises TypeError where one is of another type."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not fits(value, hint):
            raise TypeError(f"{name} is {value!r:.80}")
    return record


def fits(value: object, hint: Any) -> bool:
    """Return whether a parsed value has a type; JSON has lists for tuples, and 1 may stand for 1.0."""
    origin, arguments = get_origin(hint), [one for one in get_args(hint) if one is not ...]
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if isinstance(origin, type):
        kinds = list | tuple if origin in (list, tuple) else origin
        if not isinstance(value, kinds) or isinstance(value, str):
            return False
        items = value.values() if isinstance(value, Mapping) else value
        return all(fits(item, arguments[-1]) for item in cast(Iterable[object], items))
    if not isinstance(hint, type):
        return True  # the name of a type, which is not looked up
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"the number {number:.40} is too large")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
