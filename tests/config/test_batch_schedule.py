"""The batch ramp of Megatron-LM, sample by sample, and the steps that a budget takes."""

import pytest

from megatron_nexus.config.batch_schedule import BatchSchedule, batch_schedule
from megatron_nexus.errors import ConfigError

RAMPS = [
    batch_schedule((), 8),
    batch_schedule(("2", "2", "60"), 8),
    batch_schedule(("2", "3", "7"), 8),
    batch_schedule(("4", "4", "1"), 8),
    batch_schedule(("8", "1", "100"), 8),
    batch_schedule(("4", "4", "0"), 8),
]


def test_each_size_lasts_an_equal_share_of_the_samples() -> None:
    ramp = batch_schedule(("2", "2", "60"), 8)
    assert [ramp.size(consumed) for consumed in (0, 19, 20, 39, 40, 59, 60, 1000)] == [2, 2, 4, 4, 6, 6, 8, 8]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("consumed", [0, 3, 20, 61])
def test_steps_and_samples_are_those_of_walking_there(ramp: BatchSchedule, consumed: int) -> None:
    read, steps = 0, 0
    assert ramp.steps(consumed, 0) == ramp.steps(consumed, -5) == 0
    while read < 100:
        size = ramp.size(consumed + read)
        assert [ramp.steps(consumed, read + more) for more in (1, size)] == [steps + 1] * 2
        read, steps = read + size, steps + 1
        assert ramp.samples(consumed, steps) == read


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("4 4", "--rampup-batch-size 4 4 is not three whole numbers"),
        ("4 -4 9", "is not three whole numbers"),
        ("0 4 9", "0 and steps of 4 do not reach --global-batch-size 8"),
        ("4 0 9", "do not reach"),
        ("16 4 9", "do not reach .* give a start of at most 8"),
        ("2 4 9", "2 and steps of 4 do not reach .* such as 6"),
    ],
)
def test_a_ramp_that_does_not_reach_the_batch_is_refused(words: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        batch_schedule(words.split(), 8)
