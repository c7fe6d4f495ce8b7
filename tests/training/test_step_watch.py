"""A step that takes nearly as long as a collective may is told once, and no other step is."""

import logging
import time
from collections.abc import Iterator

import pytest

from megatron_nexus.log import logger
from megatron_nexus.training.step_watch import StepWatch


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("timeout_s", "is_first", "count"), [(0.1, True, 1), (0.1, False, 0), (60.0, True, 0), (0.0, True, 0)]
)
def test_a_step_that_hangs_is_told_by_the_first_rank_alone(
    timeout_s: float, is_first: bool, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StepWatch(timeout_s, lambda: is_first)
    with watch.step(6):
        pass
    with watch.step(7):
        deadline = time.monotonic() + (30 if count else 0.3)
        while len(caplog.records) < count or (not count and time.monotonic() < deadline):
            assert time.monotonic() < deadline + 1
            time.sleep(0.01)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * count
    for record in caplog.records:
        assert "step 7 " in record.getMessage()
        assert "--distributed-timeout-seconds-after-init" in record.getMessage()
