"""A blend gives every corpus its share at every moment, and starts anywhere."""

import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.blend import LONGEST_PERIOD, Blend, schedule, whole_shares
from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_nexus.data.samples import TokenWindows, split_documents

SHARES = [
    (1,),
    (7, 3),
    (1, 1, 1),
    (50, *[1] * 50),  # one large, many small: the order of midpoints would be off by 12
    (997, 2, 1),
    tuple(range(1, 41)),
    tuple(np.random.default_rng(5).integers(1, 900, 60).tolist()),
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_corpus_has_its_share_at_every_moment(shares: tuple[int, ...]) -> None:
    period = sum(shares)
    chosen = schedule(shares)
    counts = np.cumsum(chosen[:, None] == np.arange(len(shares)), axis=0)
    exact = np.arange(1, period + 1)[:, None] * np.array(shares)  # in units of 1 / period
    assert (counts[-1] == shares).all()
    assert (counts >= exact // period).all() and (counts <= -(-exact // period)).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ("1", (1,)),
        ("0.7 0.3", (7, 3)),
        ("70 30", (7, 3)),
        ("1/3 1/3 1/3", (1, 1, 1)),
        ("0.99999 0.00001", (99_999, 1)),
        ("123456789 987654321 1", (11_111, 88_889, 0)),
    ],
)
def test_shares_are_exact_or_rounded_by_largest_remainder(weights: str, shares: tuple[int, ...]) -> None:
    assert whole_shares([Fraction(weight) for weight in weights.split()]) == shares


def corpora(folder: Path, sizes: list[int]) -> list[TokenWindows]:
    """Corpora of windows of one token; corpus d holds the ids from 1000 d."""
    made = []
    for d, size in enumerate(sizes):
        with IndexedDatasetWriter(folder / str(d), np.int32) as writer:
            writer.add_document(range(1000 * d, 1000 * d + size + 1))
        dataset = IndexedDataset(folder / str(d))
        made.append(TokenWindows(dataset, split_documents(dataset, "1").train, 1, 9 + d, 10_000))
    return made


def test_any_cursor_continues_what_was_read_from_the_start(tmp_path: Path) -> None:
    blend = Blend(corpora(tmp_path, [40, 13, 5]), (5, 3, 1))
    streamed: list[list[int]] = []
    seen = [0, 0, 0]
    for k in range(300):
        d, j = blend.place(k)
        assert j == seen[d], "each corpus is read in its own order, without a gap"
        assert blend.counts(k).tolist() == seen
        seen[d] += 1
        streamed.append(blend.sample(k).tolist())
    fresh = Blend(corpora(tmp_path, [40, 13, 5]), (5, 3, 1))
    for k in [299, 0, 123, 17, 298, 9, 8]:
        assert fresh.sample(k).tolist() == streamed[k]


def test_a_blend_of_one_corpus_is_that_corpus(tmp_path: Path) -> None:
    (windows,) = corpora(tmp_path, [40])
    blend = Blend([windows], (1,))
    assert [blend.sample(k).tolist() for k in range(100)] == [windows.sample(k).tolist() for k in range(100)]
    assert blend.epoch_samples == 40


def test_every_corpus_has_epochs_of_its_own(tmp_path: Path) -> None:
    blend = Blend(corpora(tmp_path, [40, 13, 5]), (5, 3, 1))
    by_corpus: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for k in range(500):
        by_corpus[blend.place(k)[0]].append(int(blend.sample(k)[0]))
    for d, size in enumerate([40, 13, 5]):
        epochs = [by_corpus[d][first : first + size] for first in range(0, len(by_corpus[d]) - size, size)]
        assert all(sorted(epoch) == list(range(1000 * d, 1000 * d + size)) for epoch in epochs)
        assert all(one != other for one, other in pairwise(epochs))
    last = blend.epoch_samples
    samples = [int(blend.sample(k)[0]) for k in range(last)]
    assert len(set(samples)) == last
    assert len({int(blend.sample(k)[0]) for k in range(last + 9)}) < last + 9


def test_the_longest_period_is_made_in_a_moment() -> None:
    shares = whole_shares([Fraction(n) for n in np.random.default_rng(1).integers(10**8, 10**9, 30).tolist()])
    assert sum(shares) == LONGEST_PERIOD
    began = time.perf_counter()
    schedule(shares)
    assert time.perf_counter() - began < 5.0  # 0.2 s on an idle core
