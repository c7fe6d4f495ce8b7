"""What is told of records that cannot be read: how many, why, the first of them, and what to do."""

from collections.abc import Mapping
from typing import Final

from megatron_nexus.errors import DataError

REPORTED = 10
"""Malformed records that are shown."""

_ONE_A_LINE: Final = "write one JSON object a line; of an array, `jq -c '.[]' in.json > out.jsonl` makes them"
_REMEDIES: Final = {
    "not UTF-8": "convert the inputs to UTF-8, as `iconv -f latin1 -t utf-8 in > out` does from Latin-1",
    "not JSON": _ONE_A_LINE,
    "no JSON object": _ONE_A_LINE,
    "nested too deeply": "write records of fewer brackets within one another",
}
_ELSEWHERE: Final = "say where the text is with --json-keys or --txt-documents"


def report(malformed: Mapping[str, int], samples: list[str]) -> list[str]:
    """Lines that say how many records of each reason were left out, and show the first."""
    if not malformed:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in malformed.items())
    left_out = sum(malformed.values())
    lines = [f"  {left_out:,} malformed record{'s' if left_out > 1 else ''} left out: {reasons}"]
    lines += [f"    {sample}" for sample in samples]
    return [*lines, "    ..."] if left_out > len(samples) else lines


def no_document(
    empty: int, malformed: Mapping[str, int], samples: list[str], empty_files: list[str]
) -> DataError:
    """That the inputs hold no text: what they hold instead, and what to do about each kind of it.

    `empty_files` are the lines that tell of those.
    """
    remedies = dict.fromkeys(_REMEDIES.get(reason, _ELSEWHERE) for reason in malformed or [""])
    held = [f"  {empty:,} records without text", *empty_files, *report(malformed, samples)]
    return DataError("\n".join(["the inputs hold no document:", *held, *remedies]))
