"""A field of the configuration: its default, help text, flag, bounds, and whether growth can raise it.

All of it is stated once, where the field is declared; the command line, the rules and growth read it here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, TypeVar

MOST = 2**48
"""The largest integer of a configuration: sums and products of a few stay exact in int64 and float64."""

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field takes: from 0, or above it, to `maximum`; or in [0, `below`)."""

    positive: bool
    maximum: float
    below: float

    def problem(self, value: float) -> str | None:
        """Return the rule that `value` breaks and what to give instead, or None."""
        if self.below < inf and not 0 <= value < self.below:
            return f"must lie in [0, {self.below:g}): give such as {0.9 * self.below:g}"
        if self.maximum < value < inf:
            return f"must be at most {self.maximum:,}: give a smaller number"
        if self.positive and not 0 < value < inf:
            return "must be positive: give a finite number above 0"
        return None if 0 <= value < inf else "must not be negative: give a finite number, 0 or above"


def config_field(
    default: T,
    help_text: str,
    *aliases: str,
    positive: bool = False,
    maximum: float | None = None,
    below: float = inf,
    grows: bool = False,
) -> T:
    """Declare a field: default, help text with its unit, other spellings of its flag, and its bounds.

    A number is finite and at least 0, above it if `positive`; integers are at most `maximum`, by default
    2**48; a number with `below` is less than that. `grows`: growth can raise it.
    """
    bounds = None
    if isinstance(default, int | float) and not isinstance(default, bool):
        most = inf if isinstance(default, float) else MOST if maximum is None else maximum
        bounds = Bounds(positive, most, below)
    made: T = field(
        default=default,
        metadata={"help": help_text, "aliases": aliases, "bounds": bounds, "grows": grows},
    )
    return made


def flag_of(name: str) -> str:
    """Return the flag of a field: its name with dashes."""
    return "--" + name.replace("_", "-")


def bound_problems(section: Any) -> Iterator[str]:
    """Yield a message for each number of a section, a dataclass of `config_field`s, outside its bounds."""
    for entry in fields(section):
        bounds, value = entry.metadata["bounds"], getattr(section, entry.name)
        # As users write it: --tp, not --tensor-model-parallel-size.
        flag = next((alias for alias in entry.metadata["aliases"] if len(alias) <= 4), flag_of(entry.name))
        if bounds is not None and (said := bounds.problem(value)):
            yield f"{flag} {value} {said}"


def growing_fields(section: type) -> tuple[str, ...]:
    """Return the names of the fields that growth can raise."""
    return tuple(entry.name for entry in fields(section) if entry.metadata["grows"])
