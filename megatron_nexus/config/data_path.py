"""The words of the data flags: prefixes of corpora, their weights, names of sets, ranges of tokens.

Pure: no file is looked at, so that a wrong word is answered before anything is started.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from pathlib import Path

from megatron_nexus.errors import ConfigError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TOKENS = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)")
NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)")


@dataclass(frozen=True)
class Source:
    """A corpus of a blend; without a weight it counts by its size."""

    prefix: Path
    weight: Fraction | None


def parse_blend(flag: str, words: Sequence[str]) -> tuple[Source, ...]:
    """Return the corpora of a blend: `a`, `0.7 a 0.3 b`, or `a b` weighted by their sizes.

    Raises ConfigError: a weight is not above zero, words do not pair up, or a prefix comes twice.
    """
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 == 0 and any(weight is not None for weight in weights):
        sources = []
        for word, weight, prefix in zip(words[::2], weights, words[1::2], strict=True):
            if weight is None or weight <= 0:
                raise ConfigError(
                    f"{flag}: the weight {word!r} of {prefix} is not a finite number above 0: write such "
                    "as 0.7 a 0.3 b"
                )
            sources.append(Source(Path(prefix), weight))
    else:
        lonely = next((word for word in words if len(words) > 1 and _number(word) is not None), None)
        if lonely is not None:
            raise ConfigError(
                f"{flag} {' '.join(words)}: the weight {lonely} has no prefix after it: write 0.7 a 0.3 b"
            )
        sources = [Source(Path(prefix), None) for prefix in words]
    prefixes = [source.prefix for source in sources]
    twice = next((prefix for prefix in prefixes if prefixes.count(prefix) > 1), None)
    if twice is not None:
        raise ConfigError(f"{flag} names {twice} twice: name it once, with the sum of the weights")
    return tuple(sources)


def parse_sets(flag: str, kind: str, words: Sequence[str]) -> dict[str, tuple[Source, ...]]:
    """Return sets to evaluate on, by name: `web=a code=b` are two, anything else is one blend `kind`.

    Raises ConfigError as `parse_blend`, and where only some words have a name or two have the same.
    """
    found = [NAMED.fullmatch(word) for word in words]
    if not any(found):
        return {kind: parse_blend(flag, words)} if words else {}
    sets: dict[str, tuple[Source, ...]] = {}
    for word, match in zip(words, found, strict=True):
        if match is None:
            raise ConfigError(f"{flag}: {word!r} has no name, others have: write name=prefix for each")
        name = f"{kind} {match[1]}"
        if name in sets:
            raise ConfigError(f"{flag} names two sets {match[1]!r}: give each a name of its own")
        sets[name] = parse_blend(flag, [match[2]])
    return sets


def parse_token_range(text: str) -> tuple[int, int | None]:
    """Return first token and end of `--data-range`: `0:100B`, `1.5M:2M`, or `130B:` up to the end.

    Raises ConfigError where `text` is not such a range or holds nothing.
    """
    first, colon, last = text.partition(":")
    start = token_count(first) if first else 0
    stop = token_count(last) if last else None
    if not colon or start is None or (last and stop is None) or (stop is not None and start >= stop):
        raise ConfigError(
            f"--data-range {text!r} is not start:end in tokens, the start below the end: "
            "write such as 100B:130B, with K, M, B or T for 1e3, 1e6, 1e9 or 1e12, or 130B: to the end"
        )
    return start, stop


def _number(word: str) -> Fraction | None:
    """Return a word as a weight; 0 where it is not a number above 0, such as inf, 1e400 and 1e-400."""
    try:
        value = float(word)
    except ValueError:
        try:
            return Fraction(word)  # such as 1/3
        except (ValueError, ZeroDivisionError):
            return None
    return Fraction(word.replace("_", "")) if isfinite(value) and value else Fraction(0)


def token_count(text: str) -> int | None:
    """Return tokens of `100B`, `1.5M`, `4096`; None where `text` is not such a number."""
    match = TOKENS.fullmatch(text)
    count = Fraction(match[1]) * SUFFIXES[match[2]] if match else Fraction(1, 2)
    return int(count) if count.denominator == 1 else None
