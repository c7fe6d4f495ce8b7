"""What a resumed run says of data that differs from its checkpoint's."""

import dataclasses
import json

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.training.corpus import data_changes

SAVED = build(given_flags(["--seq-length", "64", "--split", "9,1"]))
BEFORE = json.loads(json.dumps(dataclasses.asdict(SAVED)))


@pytest.mark.parametrize(
    ("words", "now", "expected"),
    [
        ("--seq-length 128", "1 a 0:100", ["--seq-length 128, was 64"]),
        ("--seed 5", "1 a 0:100", ["--seed 5, was 1234"]),
        ("--split 8,2", "1 a 0:90", ["--split 8,2, was 9,1"]),
        ("--data-range 0:50", "1 a 0:50", ["--data-range 0:50, was not given"]),
        ("--tokenizer-model b.json", "1 a 0:100", ["--tokenizer-model b.json, was not given"]),
        ("", "1 a 0:200", ["other documents: 1 a 0:200, was 1 a 0:100"]),
        ("", "1 a 0:100", ["the content of its files, under the same names and with as many tokens"]),
        (
            "--seq-length 128 --seed 5",
            "1 b 0:7",
            ["--seq-length 128, was 64", "--seed 5, was 1234", "other documents: 1 b 0:7, was 1 a 0:100"],
        ),
    ],
)
def test_what_differs_is_named(words: str, now: str, expected: list[str]) -> None:
    assert data_changes(BEFORE, build(given_flags(words.split()), SAVED), now, "1 a 0:100") == expected
