"""Advice on recorded real runs whose ends are hidden; all of them are in docs/advice.md."""

import pytest

from benchmarks.advice import SHOWN, Case, Recorded, advice_by_pilots, cases, ends, known, load
from megatron_nexus.advice.verdict import Answer


@pytest.fixture(scope="module")
def runs() -> list[Recorded]:
    return load()


@pytest.fixture(scope="module")
def found(runs: list[Recorded]) -> dict[str, Case]:
    return {case.grown.curve.name: case for case in cases(runs)}


@pytest.mark.parametrize(
    ("which", "answer"), [(0, Answer.NOW), (1, Answer.NEVER), (2, Answer.UNKNOWN)], ids=str
)
def test_what_came_out_is_in_the_intervals_of_the_runs_that_the_page_shows(
    which: int, answer: Answer, runs: list[Recorded], found: dict[str, Case]
) -> None:
    name, what = SHOWN[which]
    case = found[name]
    advice = advice_by_pilots(case, known(case, what, runs))
    assert advice.verdict.answer is answer and advice.forecast is not None
    assert advice.forecast.gain.low <= case.gain <= advice.forecast.gain.high
    assert advice.forecast.trained_on.low <= case.trained_on <= advice.forecast.trained_on.high


def test_no_recorded_growth_has_the_opposite_advice_of_its_result(
    runs: list[Recorded], found: dict[str, Case]
) -> None:
    for case in found.values():
        answer = advice_by_pilots(case, known(case, "100 %", runs)).verdict.answer
        assert answer not in ((Answer.NEVER,) if case.gain > 0 else (Answer.NOW, Answer.LATER))


@pytest.mark.law
def test_ends_are_in_their_intervals_about_as_often_as_these_say(runs: list[Recorded]) -> None:
    for _, forecasts in ends(runs):
        inside = sum(i.low <= truth <= i.high for i, truth in forecasts.pairs)
        assert inside >= 0.85 * len(forecasts.pairs)
