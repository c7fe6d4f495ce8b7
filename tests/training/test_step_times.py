"""The rank that the others wait for is found by comparison with its own pipeline stage."""

import pytest

from megatron_nexus.parallel.beacon import Phase
from megatron_nexus.training.step_times import PhaseClock, straggler


@pytest.mark.parametrize(
    ("busy_s", "stages", "found"),
    [
        ([0.2, 0.2, 0.5, 0.2], 1, (2, 0.2)),
        ([0.2, 0.2, 0.29, 0.2], 1, None),  # less than 1.5 times
        ([0.01, 0.01, 0.05, 0.01], 1, None),  # milliseconds
        ([0.2, 0.7], 2, None),  # stages of other layers, both as fast as they can
        ([0.2, 0.4, 0.9, 0.9], 2, (1, 0.2)),  # not one of the stage that has more to do
    ],
)
def test_a_straggler_computes_longer_than_its_stage(
    busy_s: list[float], stages: int, found: tuple[int, float] | None
) -> None:
    assert straggler(busy_s, stages, threshold=1.5) == found
    assert straggler(busy_s, stages, threshold=0.0) is None


def test_a_step_that_was_given_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = 0.0, PhaseClock("cpu")
    monkeypatch.setattr("time.perf_counter", lambda: now)
    for seconds in (1.0, 100.0, 1.0):
        clock.mark(Phase.FORWARD)
        now += seconds
        clock.mark(Phase.HOOKS)
        clock.forget() if seconds > 1.0 else clock.collect()
    assert clock.seconds[Phase.FORWARD] == 2.0
