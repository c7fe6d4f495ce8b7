"""Which cases of a law run by default."""

from collections.abc import Iterable

import pytest


def first_by_default(count: int, cases: Iterable[object]) -> list[object]:
    """The cases of a parameter: the first `count` of them run by default, the others as laws."""
    return [
        case
        if number < count
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.law)
        for number, case in enumerate(cases)
    ]
