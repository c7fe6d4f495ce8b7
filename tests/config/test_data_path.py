"""The words of the data flags: what they mean, and what to write in place of those that mean nothing."""

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.data_path import Source, parse_blend, parse_sets, parse_token_range
from megatron_nexus.config.rules import check
from megatron_nexus.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", []),
        ("a", [("a", None)]),
        ("a b c", [("a", None), ("b", None), ("c", None)]),
        ("a b", [("a", None), ("b", None)]),
        ("0.7 a 0.3 b", [("a", "7/10"), ("b", "3/10")]),
        ("2 x/y=1", [("x/y=1", "2")]),
        ("1e-3 a 1/3 b", [("a", "1/1000"), ("b", "1/3")]),
    ],
)
def test_a_blend_is_its_corpora_and_weights(words: str, expected: list[tuple[str, str | None]]) -> None:
    sources = [Source(Path(prefix), weight and Fraction(weight)) for prefix, weight in expected]
    assert list(parse_blend("--data-path", words.split())) == sources


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0.7 a b", "the weight 0.7 has no prefix after it"),
        ("0.7 a x b", "the weight 'x' of b is not a finite number above 0"),
        ("0.7 a 0 b", "the weight '0' of b"),
        ("0.7 a -1 b", "the weight '-1' of b"),
        ("nan a 1 b", "the weight 'nan' of a"),
        ("inf a 1 b", "the weight 'inf' of a"),
        ("1 a +Infinity b", "the weight '+Infinity' of b"),
        ("1e400 a 1 b", "the weight '1e400' of a"),
        ("1 a 1e999999999 b", "the weight '1e999999999' of b"),
        ("1e-999999999 a 1 b", "the weight '1e-999999999' of a"),
        ("1/0 a 1 b", "the weight '1/0' of a"),
        ("1 a 2 a", "names a twice"),
        ("a a", "names a twice"),
    ],
)
def test_words_that_are_no_blend_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_blend("--data-path", words.split())
    assert message in str(caught.value)


def test_sets_have_names_or_are_one_blend() -> None:
    assert parse_sets("--valid-data-path", "validation", []) == {}
    one = parse_sets("--valid-data-path", "validation", ["2", "a", "1", "b"])
    assert {name: len(blend) for name, blend in one.items()} == {"validation": 2}
    named = parse_sets("--valid-data-path", "validation", ["web=x/a", "code=b=c"])
    assert named == {
        "validation web": (Source(Path("x/a"), None),),
        "validation code": (Source(Path("b=c"), None),),
    }
    # A slash before the sign: no name, a folder.
    assert list(parse_sets("--valid-data-path", "validation", ["/data/k=v/a"])) == ["validation"]
    for words, message in {"web=a b": "'b' has no name", "web=a web=b": "two sets 'web'"}.items():
        with pytest.raises(ConfigError, match=message):
            parse_sets("--valid-data-path", "validation", words.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:100B", (0, 100 * 10**9)),
        ("100B:130B", (100 * 10**9, 130 * 10**9)),
        ("1.5M:2M", (1_500_000, 2_000_000)),
        ("7K:", (7000, None)),
        (":3", (0, 3)),
        ("0.1T:1T", (10**11, 10**12)),
    ],
)
def test_ranges_count_tokens(text: str, expected: tuple[int, int | None]) -> None:
    assert parse_token_range(text) == expected


@pytest.mark.parametrize("text", ["100B", "2:1", "5:5", "-1:4", "a:b", "0:1G", "0.5:2", "1:2:3", "0:0"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--data-range"):
        parse_token_range(text)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ("--data-path a --train-data-path b --valid-data-path c", ["drop one of them"]),
        ("--train-data-path b", ["give --valid-data-path too"]),
        ("--valid-data-path v", ["--valid-data-path belongs to a --data-path"]),
        ("--data-path 1 a 0 b --data-range 5:1", ["the weight '0' of b", "--data-range '5:1'"]),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(build(given_flags(words.split())), 1)
    assert len(caught.value.problems) == len(problems)
    assert all(message in problem for message, problem in zip(problems, caught.value.problems, strict=True))
