"""Effective time: each second of a run is counted once, over kills, requeues and rewinds."""

import json
from pathlib import Path

import pytest

from megatron_nexus.base.duration import duration
from megatron_nexus.training.effective_time import effective_time
from megatron_nexus.training.metrics import METRICS_FILE, StepMetrics
from megatron_nexus.training.recorder import TimeLeft
from megatron_nexus.training.run_times import RUN_TIMES_FILE, RunTimes, record_lost_steps


def step_record(step: int, time: float, step_s: float = 10.0, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 4.0, "step_s": step_s, "time": time, **more}


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_each_second_of_a_run_is_counted_once(tmp_path: Path) -> None:
    # A start of 40 s, a first step of 25 s, four more; killed in the sixth, of which nothing is known. It had
    # saved after step 3. After 100 s it starts again, at step 4, leaves out step 5, and ends.
    write(
        tmp_path / RUN_TIMES_FILE,
        [
            {"what": "start", "time": 1000.0},
            {"what": "training", "time": 1040.0},
            {"what": "checkpoint", "time": 1090.0, "seconds": 5.0},
            {"what": "start", "time": 1210.0},
            {"what": "lost", "time": 1110.0, "seconds": 20.0, "steps": 2},
            {"what": "training", "time": 1240.0},
            {"what": "evaluation", "time": 1267.0, "seconds": 6.0},
            {"what": "end", "time": 1268.0},
        ],
    )
    first = [step_record(1, 1065.0, 25.0), step_record(2, 1075.0), step_record(3, 1085.0)]
    second = [step_record(4, 1250.0), step_record(5, 1260.0, skipped=True)]
    write(tmp_path / METRICS_FILE, [*first, *second])
    found = effective_time(tmp_path)
    assert found is not None
    assert found.starts == 2
    assert found.productive_s == 40.0, "of four kept steps; 15 s of the first are those of a start"
    assert found.start_up_s == 40.0 + 15.0 + 30.0
    assert (found.checkpoint_s, found.evaluation_s, found.lost_s) == (5.0, 6.0, 20.0 + 10.0)
    assert found.down_s == 100.0, "since its last record"
    assert found.other_s == pytest.approx(2.0)
    assert found.total_s == pytest.approx(268.0)
    assert found.ettr == pytest.approx(40 / 268)
    assert str(found).startswith("ETTR 14.9 % of 4 min in 2 starts: start-up 31.7 %, checkpoints 1.9 %")


def test_a_start_whose_clock_is_behind_loses_no_time(tmp_path: Path) -> None:
    # The second machine is 500 s behind, and its start bears a time before the first.
    starts = [{"what": what, "time": t} for t in (1000.0, 700.0) for what in ("start", "training")]
    write(tmp_path / RUN_TIMES_FILE, starts)
    write(tmp_path / METRICS_FILE, [step_record(1, 1010.0), step_record(2, 710.0)])
    found = effective_time(tmp_path)
    assert found is not None
    assert (found.productive_s, found.down_s, found.total_s) == (20.0, 290.0, 310.0)


def test_steps_of_several_starts_that_are_lost_are_those_of_each(tmp_path: Path) -> None:
    # Steps 3 and 4, a start, step 5, a start: the checkpoint of step 4 is damaged, that of step 2 is not.
    starts = [{"what": what, "time": t} for t in (1000.0, 1100.0, 1200.0) for what in ("start", "training")]
    write(tmp_path / RUN_TIMES_FILE, starts)
    first = [step_record(step, 1000.0 + 10 * step) for step in (1, 2, 3, 4)]
    record_lost_steps(tmp_path, [*first[2:], step_record(5, 1110.0, 9.0)])
    write(tmp_path / METRICS_FILE, [*first[:2], step_record(3, 1210.0)])
    found = effective_time(tmp_path)
    assert found is not None
    assert (found.productive_s, found.lost_s, found.other_s) == (30.0, 29.0, pytest.approx(1.0))
    assert found.total_s == pytest.approx(210.0)


def test_an_evaluation_before_the_first_step_is_counted_once(tmp_path: Path) -> None:
    events = [
        {"what": "start", "time": 1000.0},
        {"what": "evaluation", "time": 1040.0, "seconds": 25.0},
        {"what": "training", "time": 1040.0},
    ]
    write(tmp_path / RUN_TIMES_FILE, events)
    write(tmp_path / METRICS_FILE, [step_record(1, 1050.0)])
    found = effective_time(tmp_path)
    assert found is not None
    assert (found.start_up_s, found.evaluation_s, found.total_s) == (15.0, 25.0, 50.0)


def test_a_run_records_its_own_time_and_survives_what_is_cut_short(tmp_path: Path) -> None:
    assert effective_time(tmp_path) is None, "a run of an older version"
    times = RunTimes(tmp_path, writes=True)
    times.begin_training()
    with times.span("checkpoint"), times.span("evaluation"):
        times.add("lost", 2.0)
    record_lost_steps(tmp_path, [step_record(3, 50.0), {"step": 3, "validation_loss": 1.0}])
    RunTimes(tmp_path / "other", writes=False).on_end()
    with (tmp_path / RUN_TIMES_FILE).open("a") as file:
        file.write('{"what": "check')
    found = effective_time(tmp_path)
    assert found is not None
    assert found.lost_s == 2.0, "steps from before the first start are not this run's"
    assert found.productive_s == 0.0 and found.ettr == 0.0
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.31, "0.3 s"), (45, "45 s"), (130, "2 min"), (11520, "3.2 h"), (36000, "10 h"), (207360, "2.4 d")],
)
def test_durations_have_the_unit_that_suits_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_the_time_left_is_that_of_a_median_step_and_of_what_is_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, clock = TimeLeft(last_tokens=10_000), 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    shown: list[float | None] = []
    # A first step that compiles, and one that waits for a disk; a quarter of the time is between the steps.
    for step, step_s in enumerate([60.0, 3.0, 3.0, 30.0, 3.0, 3.0], start=1):
        clock += step_s * 4 / 3
        shown.append(
            left.seconds(StepMetrics(step, 4.0, 0.0, 1.0, 100 * step, step_s, 100 / step_s, 0, None, 0))
        )
    assert shown[:3] == [None] * 3
    assert shown[5] == pytest.approx((100 - 6) * 3.0 * 4 / 3)
