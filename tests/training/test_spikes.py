"""The spike score is OLMo-core's: standard deviations above the mean of the last finite values."""

import math

import pytest

from megatron_nexus.checkpoint.manifest import DataRecord
from megatron_nexus.training.spikes import SpikeDetector

STEPS = [(3.0, 1.0), (3.2, 1.1), (2.8, 0.9), (3.0, 1.0)]


def detector(length: int = 8, sigmas: float = 6.0) -> SpikeDetector:
    made = SpikeDetector(length, sigmas)
    made.set(STEPS)
    return made


def test_the_score_counts_standard_deviations_of_loss_and_norm() -> None:
    losses = [loss for loss, _ in STEPS]
    deviation = math.sqrt(sum((loss - 3.0) ** 2 for loss in losses) / 3)  # unbiased, as torch.std
    assert detector().score(3.0 + 5 * deviation, 1.0) == pytest.approx(5.0)
    assert detector().score(None, 1.0 + 7 * deviation / 2) == pytest.approx(7.0)
    assert detector().score(-100.0, 0.0) == 0.0, "only values above the mean are spikes"
    assert detector().admits(3.0 + 5.9 * deviation, 1.0)
    assert not detector().admits(3.0 + 6.1 * deviation, 1.0)
    assert not detector().admits(3.0, 1.0 + 6.1 * deviation / 2)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf)])
def test_what_is_not_finite_is_a_spike_from_the_first_step(loss: float, norm: float) -> None:
    assert SpikeDetector(128, 6.0).score(loss, norm) == math.inf
    assert SpikeDetector(128, 6.0).score(1e9, 1e9) == 0.0, "nothing is known yet"


def test_few_steps_judge_nothing_and_old_ones_are_forgotten() -> None:
    assert detector(length=12).admits(1e9, 1e9), "fewer than half of the interval"
    full = detector(length=4)
    for _ in range(4):
        full.add(50.0, 1.0)
    assert full.score(50.0, 1.0) == 0.0


def test_samples_that_are_left_out_are_passed_over_once() -> None:
    data = DataRecord("f", "d", first_sample=2, left_out=((8, 4), (12, 4)))
    assert data.past_left_out(9) == data
    moved = data.past_left_out(10)  # the ninth of the data, after which eight follow that are left out
    assert 10 - moved.first_sample == 16
    assert moved.past_left_out(10) == moved
