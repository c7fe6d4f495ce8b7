"""The experiment of examples/unlearning: its areas, its intervals, its corpora."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "unlearning"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules of the example, which is not a package."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import corpora
    import tables

    yield corpora, tables
    for name in ("corpora", "tables"):
        del sys.modules[name]


def test_the_area_is_what_points_dominate(modules: tuple[ModuleType, ModuleType]) -> None:
    _, tables = modules
    assert tables.area([]) == 0.0
    assert tables.area([(0.0, 1.0)]) == 1.0
    assert tables.area([(0.25, 0.5)]) == pytest.approx(0.75 * 0.5)
    front = [(0.1, 0.3), (0.5, 0.9)]
    assert tables.area(front) == pytest.approx(0.4 * 0.3 + 0.5 * 0.9)
    assert tables.area([*front, (0.6, 0.8), (0.1, 0.2)]) == pytest.approx(tables.area(front))
    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(20)]
    hits = [
        any(f <= x and r >= y for f, r in points)
        for x, y in ((rng.random(), rng.random()) for _ in range(40000))
    ]
    assert tables.area(points) == pytest.approx(sum(hits) / len(hits), abs=0.01)


def test_the_interval_of_a_mean_narrows_with_seeds(modules: tuple[ModuleType, ModuleType]) -> None:
    _, tables = modules
    assert tables.interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    rng = random.Random(1)
    few, many = ([rng.gauss(0.5, 0.1) for _ in range(n)] for n in (5, 50))
    for values in (few, many):
        mean, low, high = tables.interval(values)
        assert low < mean < high
    assert tables.interval(many)[2] - tables.interval(many)[1] < 0.5 * (0.1 * 4 / 5**0.5)


def test_corpora_hold_their_targets_and_no_query(modules: tuple[ModuleType, ModuleType]) -> None:
    corpora, _ = modules
    corpus = corpora.make_corpus(3)
    texts = [sample.text for sample in corpus.samples]
    assert len(texts) == len(set(texts)) == 720
    for task in corpora.TASKS:
        assert sum(sample.kind == task for sample in corpus.samples) == corpora.TARGETS
        queries = {sample.text for sample in corpus.queries[task]}
        assert len(queries) == corpora.QUERIES and not queries & set(texts)
        assert len(corpus.forget_set(task)) == 64
    domain = [sample.answer for sample in corpus.samples if sample.kind == "domain"]
    assert len(set(domain)) == len(domain)
    assert corpora.make_corpus(3) == corpus
