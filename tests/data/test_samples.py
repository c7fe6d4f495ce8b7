"""Splits, windows and the order of samples: nothing is lost, nothing twice, nothing depends on the past."""

import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_nexus.data.samples import Permutation, SplitRange, TokenWindows, restrict, split_documents
from megatron_nexus.errors import DataError


def corpus(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of the given lengths whose tokens count up from 0, so that a token is its position."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for start, stop in pairwise(np.cumsum([0, *lengths]).tolist()):
            writer.add_document(range(start, stop))
    return IndexedDataset(prefix)


def whole(dataset: IndexedDataset) -> SplitRange:
    return split_documents(dataset, "1").train


def test_a_permutation_is_a_bijection() -> None:
    for n in (*range(1, 40), 97, 100, 101, 1023, 1024, 1025, 3001):
        for seed, epoch in [(0, 0), (1, 0), (0, 1), (-3, 2), (2**63, 7)]:
            order = Permutation(n, seed, epoch)
            assert sorted(order[i] for i in range(n)) == list(range(n)), (n, seed, epoch)


def test_permutations_of_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(Permutation(50, seed, epoch)[i] for i in range(50)) for seed in range(10) for epoch in range(10)
    }
    assert len(orders) == 100


def test_a_permutation_shuffles_evenly() -> None:
    """Each of 7 values at each of 7 places: 2,000 draws give 286 each, standard deviation 16; 5 of them."""
    counts = np.zeros((7, 7), dtype=int)
    for seed in range(2000):
        order = Permutation(7, seed, 0)
        for place in range(7):
            counts[place, order[place]] += 1
    assert abs(counts - 2000 / 7).max() < 80


def test_neighbours_are_torn_apart() -> None:
    """Of 100,000 pairs of neighbours about two stay neighbours in a uniform shuffle."""
    order = Permutation(100_000, 5, 0)
    places = [order[i] for i in range(20_000)]
    assert sum(abs(b - a) == 1 for a, b in pairwise(places)) < 10
    assert abs(np.corrcoef(np.arange(20_000), places)[0, 1]) < 0.05


def test_the_largest_corpora_cost_nothing() -> None:
    n = 10**12 + 39
    order = Permutation(n, 0, 0)
    assert all(0 <= order[i] < n for i in (0, 1, n // 2, n - 1))


@pytest.mark.parametrize(
    ("weights", "cuts"),
    [("969,30,1", (969, 999, 1000)), ("1", (1000, 1000, 1000)), ("98,2", (980, 1000, 1000)),
     ("1,1,1", (333, 667, 1000)), ("0.5,0.25,0.25", (500, 750, 1000))],
)  # fmt: skip
def test_splits_cut_between_documents(tmp_path: Path, weights: str, cuts: tuple[int, int, int]) -> None:
    lengths = np.random.default_rng(0).integers(0, 9, 1000).tolist()
    splits = split_documents(corpus(tmp_path / "c", lengths), weights)
    starts = np.cumsum([0, *lengths])
    for part, (first, last) in zip(
        (splits.train, splits.validation, splits.test), pairwise((0, *cuts)), strict=True
    ):
        assert part.tokens == range(starts[first], starts[last])


@pytest.mark.parametrize("weights", ["", "a", "0,1,1", "1,-1", "1,1,1,1", "nan", "inf,1", "1,nan"])
def test_weights_that_are_none_are_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(DataError, match="--split"):
        split_documents(corpus(tmp_path / "c", [3, 3]), weights)


def test_an_epoch_predicts_every_token_once(tmp_path: Path) -> None:
    dataset = corpus(tmp_path / "c", [100, 23])
    windows = TokenWindows(dataset, whole(dataset), seq_length=8, seed=1, vocab_size=123)
    assert windows.window_count == 15
    for epoch in range(3):
        ks = range(epoch * 15, epoch * 15 + 15)
        samples = np.stack([windows.sample(k) for k in ks])
        assert samples.shape == (15, 9) and samples.dtype == np.int64
        assert sorted(samples[:, 1:].ravel().tolist()) == list(range(1, 121))
        assert {k // windows.window_count for k in ks} == {epoch}


def test_a_sample_depends_on_its_number_only(tmp_path: Path) -> None:
    dataset = corpus(tmp_path / "c", [1000])
    ahead, back = (TokenWindows(dataset, whole(dataset), 10, seed=3, vocab_size=1000) for _ in range(2))
    forwards = [ahead.sample(k).tolist() for k in range(250)]
    assert [back.sample(k).tolist() for k in reversed(range(250))] == forwards[::-1]
    assert forwards[:99] != forwards[99:198]


def test_a_sample_is_the_same_while_another_thread_reads_another_epoch(tmp_path: Path) -> None:
    windows = TokenWindows(data := corpus(tmp_path / "c", [400]), whole(data), 4, seed=1, vocab_size=400)
    alone = [windows.sample(k).tolist() for k in range(windows.window_count)]

    def other_thread(frame: FrameType, event: str, argument: object) -> object:
        """Read a sample of the second epoch before each line that finds one of the first."""
        if frame.f_code is TokenWindows._start.__code__:
            windows.sample(windows.window_count)
        return other_thread

    before = sys.gettrace()
    sys.settrace(other_thread)
    try:
        found = [windows.sample(k).tolist() for k in range(windows.window_count)]
    finally:
        sys.settrace(before)
    assert found == alone


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    dataset = corpus(tmp_path / "c", [201])
    windows = TokenWindows(dataset, whole(dataset), 200, seed=0, vocab_size=200)
    with pytest.raises(DataError, match=r"c\.bin holds the token id 200, .* has 200 ids"):
        windows.sample(0)


def tokens_of(windows: TokenWindows) -> set[int]:
    return {token for k in range(windows.window_count) for token in windows.sample(k).tolist()}


@pytest.mark.parametrize("share", [Fraction(1), Fraction(1, 3)])
def test_disjoint_ranges_share_no_token(tmp_path: Path, share: Fraction) -> None:
    dataset = corpus(tmp_path / "c", [700, 800])
    seen: set[int] = set()
    for first, last in [(0, 100), (100, 401), (401, 1000), (1000, None)]:
        part = restrict(dataset, whole(dataset), share, first, last)
        tokens = tokens_of(TokenWindows(dataset, part, 7, seed=5, vocab_size=1500))
        assert not seen & tokens
        assert min(tokens) >= int(share * first) and max(tokens) < (share * last if last else 1500)
        assert len(tokens) > len(part.tokens) - 7, "all of a range but less than a window is read"
        seen |= tokens
    assert len(seen) > 1500 - 4 * 7


@pytest.mark.parametrize(
    ("first", "last", "share", "most"),
    [(0, 1501, 1, "1,500"), (1500, None, 1, "1,500"), (0, 3001, Fraction(1, 2), "3,000")],
)
def test_a_range_outside_the_corpus_states_its_size(
    tmp_path: Path, first: int, last: int | None, share: Fraction | int, most: str
) -> None:
    dataset = corpus(tmp_path / "c", [700, 800])
    if share != 1:
        assert restrict(dataset, whole(dataset), Fraction(share), first, 3001).tokens == range(1500)
        last = 3002
    with pytest.raises(DataError, match=rf"training part has 1,500 tokens: use an end of at most {most}"):
        restrict(dataset, whole(dataset), Fraction(share), first, last)


@pytest.mark.parametrize(("tokens", "enough"), [(9, True), (8, False), (0, False)])
def test_less_than_one_window_is_refused(tmp_path: Path, tokens: int, enough: bool) -> None:
    dataset = corpus(tmp_path / "c", [tokens, 100])
    part = split_documents(dataset, "1,1").train
    if enough:
        assert TokenWindows(dataset, part, 8, seed=0, vocab_size=200).window_count == 1
    else:
        with pytest.raises(DataError, match=rf"training part .* has {tokens} tokens, .* needs 9"):
            TokenWindows(dataset, part, 8, seed=0, vocab_size=200)


def test_positions_restart_with_each_document(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(0, 12, 200).tolist()
    dataset = corpus(tmp_path / "c", lengths)
    places = [place for length in lengths for place in range(length)]  # by token, which is its position
    windows = TokenWindows(dataset, whole(dataset), 16, seed=1, vocab_size=len(places))
    assert windows.window_count > 50
    for k in range(windows.window_count):
        tokens, positions = windows.sample(k)[:-1], windows.positions(k)
        expected = [min(places[token], token - tokens[0]) for token in tokens.tolist()]
        assert positions.tolist() == expected
