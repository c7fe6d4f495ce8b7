"""The learning rate is a pure function of the step: warm-up, one of four shapes, and its end."""

from dataclasses import replace
from itertools import pairwise
from math import cos, pi

import pytest

from megatron_nexus.config.run_config import DecayStyle, OptimizerConfig
from megatron_nexus.config.schedule import learning_rate

BASE = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=10)
STYLES: list[DecayStyle] = ["cosine", "linear", "constant", "WSD"]
LAST = 110


def rates(optimizer: OptimizerConfig, last: int = LAST) -> list[float]:
    """The rates of the steps 1 ... last, at their own indices."""
    return [0.0, *(learning_rate(optimizer, step, last) for step in range(1, last + 1))]


@pytest.mark.parametrize("style", STYLES)
def test_warm_up_is_linear_from_zero_to_the_peak(style: DecayStyle) -> None:
    optimizer = replace(BASE, lr_decay_style=style)
    assert rates(optimizer)[:11] == pytest.approx([step / 10 for step in range(11)])


@pytest.mark.parametrize("style", STYLES)
def test_without_warm_up_no_step_is_lost_at_zero(style: DecayStyle) -> None:
    optimizer = replace(BASE, lr_decay_style=style, lr_warmup_iters=0)
    # The first of 110 steps of a decay by 0.9 falls by at most 0.9 / 110 (linear; the others by less).
    assert 1.0 - 0.9 / LAST - 1e-12 <= learning_rate(optimizer, 1, LAST) <= 1.0


@pytest.mark.parametrize("style", STYLES)
def test_after_the_warm_up_the_rate_never_rises_and_stays_in_its_bounds(style: DecayStyle) -> None:
    decay = rates(replace(BASE, lr_decay_style=style))[10:]
    assert all(later <= earlier for earlier, later in pairwise(decay))
    assert (decay[0], decay[-1]) == (1.0, 1.0 if style == "constant" else 0.1)


def test_cosine_and_linear_meet_halfway_and_differ_elsewhere() -> None:
    cosine, linear = (rates(replace(BASE, lr_decay_style=style)) for style in STYLES[:2])
    middle, quarter = 10 + 50, 10 + 25
    assert cosine[middle] == pytest.approx(linear[middle]) == pytest.approx(0.55)
    assert linear[quarter] == pytest.approx(1.0 - 0.9 / 4)
    assert cosine[quarter] == pytest.approx(0.1 + 0.9 * (1 + cos(pi / 4)) / 2)


@pytest.mark.parametrize(("asked", "length"), [(0, 11), (1, 1), (40, 40)])
def test_wsd_is_stable_until_its_last_steps(asked: int, length: int) -> None:
    rate = rates(replace(BASE, lr_decay_style="WSD", lr_wsd_decay_iters=asked))
    assert set(rate[10 : LAST - length + 1]) == {1.0}
    expected = [1.0 - 0.9 * done / length for done in range(1, length + 1)]
    assert rate[LAST - length + 1 :] == pytest.approx(expected)


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_a_decay_that_ends_early_stays_at_its_end(style: DecayStyle) -> None:
    early = replace(BASE, lr_decay_style=style, lr_decay_iters=60)
    assert rates(early, 110)[:61] == rates(
        BASE if style == "cosine" else replace(early, lr_decay_iters=0), 60
    )
    assert set(rates(early, 110)[60:]) == {0.1}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("warmup", "last"), [(10, 5), (10, 10), (1, 1), (0, 1)])
def test_a_run_no_longer_than_its_warm_up_is_possible(style: DecayStyle, warmup: int, last: int) -> None:
    rate = rates(replace(BASE, lr_decay_style=style, lr_warmup_iters=warmup), last)
    assert all(0.0 < value <= 1.0 for value in rate[1:])
    if warmup:
        assert rate[last] == pytest.approx(last / warmup)


@pytest.mark.parametrize("style", STYLES)
def test_a_schedule_in_samples_is_that_in_steps_whatever_the_batch(style: DecayStyle) -> None:
    in_steps = replace(BASE, lr_decay_style=style, lr_decay_iters=100, lr_wsd_decay_iters=20)
    in_samples = OptimizerConfig(
        *(1.0, 0.1, style), lr_decay_samples=800, lr_warmup_samples=80, lr_wsd_decay_samples=160
    )
    assert [learning_rate(in_samples, 8 * step, 8 * LAST) for step in range(1, LAST + 1)] == pytest.approx(
        rates(in_steps)[1:]
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_later_phase_has_a_schedule_of_its_own(style: DecayStyle) -> None:
    first = replace(BASE, lr_decay_style=style)
    later = replace(first, lr_start_iter=100)
    assert rates(later, 100 + LAST)[101:] == rates(first)[1:]
    assert learning_rate(later, 3, 100 + LAST) == rates(first)[1]
