"""What --inject takes, and what it answers to all else; what the new flags refuse."""

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.injection import InjectedFault, check_faults, parse_faults
from megatron_nexus.config.rules import check
from megatron_nexus.errors import ConfigError


def test_a_fault_is_a_kind_a_step_and_a_rank() -> None:
    words = ["rank_hung@12,rank=0", "bit_flip@3,rank=1", "slow_rank@4,rank=1,seconds=0.5"]
    faults = parse_faults(["rank_hung@12", *words[1:]])
    assert faults == (
        InjectedFault("rank_hung", 12, 0),
        InjectedFault("bit_flip", 3, 1),
        InjectedFault("slow_rank", 4, 1, 0.5),
    )
    assert list(map(str, faults)) == words


def test_a_second_flag_adds_its_faults() -> None:
    words = given_flags(["--inject", "nan@3", "--inject", "spike@4", "nan@5"])["inject"]
    assert words == ("nan@3", "spike@4", "nan@5")


@pytest.mark.parametrize(
    "word", ["rank_hung", "rank_hung@0", "hang@3", "nan@3,rank=-1", "nan@3,seconds=1", "nan@3,1", "nan@x"]
)
def test_another_word_is_refused_with_one_that_is_right(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"--inject {word} is not a fault: write such as rank_hung@12 or"):
        parse_faults([word])


@pytest.mark.parametrize(
    ("word", "zero_stage", "expected"),
    [
        ("nan@3,rank=2", 1, "--inject nan@3,rank=2: the world has 2 ranks: give a rank from 0 to 1"),
        ("bit_flip@3", 3, "at --zero-stage 3 no rank holds a whole weight: use --zero-stage 0 to 2"),
        ("nan@11", 1, "--inject nan@11,rank=0: the run ends at step 10: give a step up to that"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(word: str, zero_stage: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_faults(parse_faults([word]), 2, zero_stage, 10)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--profile-step-start 5 --profile-step-end 5", "--profile-step-end 5 .*: give more than 5"),
        ("--profile-step-end 102", "--profile-step-end 102: the run ends at step 100: give at most 101"),
        ("--profile-ranks 0 2", "--profile-ranks 2: the world has 2 ranks: give numbers from 0 to 1"),
        ("--profile-ranks first", "--profile-ranks first: .* give numbers from 0 to 1"),
    ],
)
def test_what_cannot_be_profiled_is_refused(words: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check(build(given_flags(["--profile", *words.split()])), 2)
    check(build(given_flags(words.split())), 2)


def test_without_copies_of_weights_none_are_compared() -> None:
    words = ["--zero-stage", "3", "--check-weight-hash-across-dp-replicas-interval", "100"]
    with pytest.raises(ConfigError, match=r"replicas-interval 100 .*: drop it, or use --zero-stage 0 to 2"):
        check(build(given_flags(words)), 1)
