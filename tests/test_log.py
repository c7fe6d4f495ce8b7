"""The console: one rank speaks, and work that takes time is never silent."""

import os
import re
import time

import pytest

from megatron_nexus import log
from tests.support.waiting import wait_for


def test_a_rank_that_does_not_speak_shows_warnings_only(console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=False)
    log.logger.info("saved")
    log.logger.warning("a rank is slow")
    assert console.readouterr() == ("a rank is slow\n", "")


def test_messages_come_bare_and_once_however_often_the_console_is_set_up(
    console: pytest.CaptureFixture[str],
) -> None:
    log.configure(is_main_rank=True)
    log.configure(is_main_rank=True)
    log.logger.info("saved %s", "here")
    assert console.readouterr() == ("saved here\n", "")


def test_progress_tells_begin_and_end(console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=True)
    with log.Progress("reading"):
        pass
    assert re.fullmatch(r"reading \.\.\.\nreading: done in \d+\.\d s\n", console.readouterr().out)


def test_long_work_tells_the_share_done_and_the_time_left(console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=True)
    printed: list[str] = []

    def tells(line: str) -> bool:
        printed.extend(console.readouterr().out.splitlines())
        return any(re.fullmatch(line, x) for x in printed[1:])

    with log.Progress("reading", total=4000, unit="bytes", interval_s=0.02) as progress:
        wait_for(lambda: tells(r"reading \.\.\. \d+ s"), "word of one long call that tells nothing itself")
        progress.advance(1000)
        share = r"reading \.\.\. 1,000 of 4,000 bytes, \d+ s, about \d+ s left"
        wait_for(lambda: tells(share), "the share done")


def test_work_that_fails_is_not_called_done_and_falls_silent(console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=True)
    with pytest.raises(ValueError, match="torn"), log.Progress("reading", interval_s=0.02):
        raise ValueError("torn")
    time.sleep(0.1)
    assert console.readouterr().out == "reading ...\n"


def test_a_reader_that_has_enough_is_no_error_and_the_work_goes_on(
    console: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        log.configure(is_main_rank=True, stream=stream)
        with log.Progress("reading"):
            log.logger.info("read by nobody")
    assert console.readouterr() == ("", "")


def test_a_stage_that_ends_soon_prints_nothing(console: pytest.CaptureFixture[str]) -> None:
    log.configure(is_main_rank=True)
    with log.Progress("quick", after_s=60.0):
        pass
    assert console.readouterr().out == ""
    with log.Progress("slow", after_s=0.01):
        time.sleep(0.2)
    assert re.fullmatch(r"slow \.\.\.\nslow: done in 0\.\d s\n", console.readouterr().out)
