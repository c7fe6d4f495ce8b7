"""Law: every way in which JSON of others can be wrong is a ValueError or TypeError that says how."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megatron_nexus.base.json_text import fits, parse_json, parse_record, record_of

DIGITS = "1" * 5000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("1e400", "the number 1e400 is too large"),
        ('{"a": -1e999}', "the number -1e999 is too large"),
        (DIGITS, "a number of 5,000 digits"),
        ("NaN", "NaN is not a number of JSON"),
        ("-Infinity", "-Infinity is not"),
        ("{", "Expecting"),
        (b"\xff", "utf-8"),
        ("", "Expecting"),
    ],
)
def test_a_text_that_cannot_be_used_is_a_value_error(text: str | bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_json(text)


def test_what_can_be_used_is_what_json_says() -> None:
    text = '{"a": [1, -2.5, true, null, "\\u00fc"], "b": 100000000000000000000}'
    assert parse_json(text) == parse_record(text) == json.loads(text)


def test_a_record_may_hold_numbers_of_any_size() -> None:
    big = parse_record(f'{{"n": {DIGITS}, "m": 7, "x": 1e400, "text": "a"}}')
    assert (big["n"], big["m"], type(big["m"]), big["text"]) == (float("inf"), 7, int, "a")
    for wrong in ("[" * 100_000, "{", b"\xff"):
        with pytest.raises(ValueError):
            parse_record(wrong)


@dataclass(frozen=True)
class Example:
    count: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    parts: tuple[int, ...] = ()
    by_name: Mapping[str, Mapping[str, Any]] | None = None


def test_a_dataclass_of_parsed_json_has_the_types_that_it_says() -> None:
    assert record_of(Example, {"count": 1, "rate": 2, "parts": [1, 2]}) == Example(1, 2, parts=[1, 2])  # type: ignore[arg-type]
    for wrong in (
        [],
        {},
        {"count": 1, "other": 2},
        {"count": 1.0},
        {"count": True},
        {"count": "1"},
        {"count": 1, "rate": None},
        {"count": 1, "kind": "c"},
        {"count": 1, "parts": "12"},
        {"count": 1, "parts": ["1"]},
        {"count": 1, "by_name": {"x": 3}},
    ):
        with pytest.raises(TypeError):
            record_of(Example, wrong)
    assert fits([{"a": 1}], Sequence[Mapping[str, Any]]) and not fits("text", Sequence[Mapping[str, Any]])
