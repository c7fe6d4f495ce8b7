"""Which tokens make the k-th sample: parts of a corpus, windows of a part, and their shuffled order.

The order is a function of (seed, k) only and takes no memory: no index file is built, shared or kept, and
a run resumes anywhere by naming the number of samples it has seen.

L sequence length, n windows per epoch.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import isqrt

import numpy as np
import numpy.typing as npt

from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.errors import DataError

SPLIT_NAMES = ("training", "validation", "test")
FEISTEL_ROUNDS = 8
MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class SplitRange:
    """A contiguous part of a corpus."""

    name: str
    """What messages call it: training, validation or test."""
    tokens: range
    """Where its tokens stand in the token stream of the corpus."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a corpus; a part of weight 0 is empty."""

    train: SplitRange
    validation: SplitRange
    test: SplitRange


def split_shares(weights: str) -> list[float]:
    """Return the shares of training, validation and test. Raises DataError as `split_documents`."""
    problem = DataError(
        f"--split {weights!r} is not one to three non-negative numbers, the first above zero: "
        'write the shares of training, validation and test, as in "969,30,1"'
    )
    try:
        shares = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise problem from None
    if not (len(shares) <= 3 and min(shares) >= 0 and shares[0] > 0 and sum(shares) < float("inf")):
        raise problem
    return shares + [0.0] * (3 - len(shares))


def split_documents(dataset: IndexedDataset, weights: str) -> Splits:
    """Cut a corpus into training, validation and test documents, in this order.

    `weights` are one to three numbers such as "969,30,1"; they need not add up to anything. The cuts are the
    rounded cumulative shares of the documents, as in Megatron-LM. Raises DataError.
    """
    shares = split_shares(weights)
    total = sum(shares)
    cuts = [round(share / total * dataset.document_count) for share in accumulate(shares, initial=0.0)]
    starts = [dataset.document_start(cut) for cut in cuts]
    return Splits(*map(SplitRange, SPLIT_NAMES, map(range, starts, starts[1:])))


def restrict(
    dataset: IndexedDataset, part: SplitRange, share: Fraction, first: int, last: int | None
) -> SplitRange:
    """Return the tokens [first, last) of a blend that has `share` of its tokens from this part of a corpus.

    Ranges that have no token in common give parts that have none in common. Without `last`, up to the end.

    Raises DataError: the part has not that many tokens.
    """
    held = len(part.tokens)
    start, stop = int(share * first), held if last is None else int(share * last)
    if start >= held or stop > held:
        of_blend = "" if share == 1 else f", {float(share):.4g} of the blend"
        raise DataError(
            f"--data-range {first:,}:{'' if last is None else f'{last:,}'} asks for the tokens "
            f"{start:,}:{'' if last is None else f'{stop:,}'} of {dataset.prefix}{of_blend}, "
            f"whose {part.name} part has {held:,} tokens: "
            f"use an end of at most {int(held / share):,}, or a larger corpus"
        )
    return SplitRange(part.name, range(part.tokens.start + start, part.tokens.start + stop))


def _mix(x: int) -> int:
    """Scramble 64 bits one to one, each output bit depending on each input bit (splitmix64's finalizer)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


class Permutation:
    """A seeded shuffle of range(n) that is computed, not stored: `permutation[i]` in O(1) time and memory.

    A Feistel network over the grid a x b >= n, a = ceil(sqrt n): each round adds to one coordinate a hash of
    the other, which is invertible; an image outside range(n) is mapped again until it falls inside
    (cycle-walking), which the a - 1 spare cells at most make rare. Source: Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert n > 0, n
        self._n = n
        self._height = isqrt(n - 1) + 1
        self._width = -(-n // self._height)
        key = _mix(_mix(seed & MASK_64) + epoch & MASK_64)
        self._keys = [_mix(key + round_ & MASK_64) for round_ in range(1, FEISTEL_ROUNDS + 1)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self._n, (index, self._n)
        while True:
            row, column = divmod(index, self._width)
            for row_key, column_key in zip(self._keys[::2], self._keys[1::2], strict=True):
                row = (row + _mix(column ^ row_key)) % self._height
                column = (column + _mix(row ^ column_key)) % self._width
            index = row * self._width + column
            if index < self._n:
                return index


@lru_cache(maxsize=4096)
def permutation(n: int, seed: int, epoch: int) -> Permutation:
    """Return the order of range(n) in an epoch."""
    return Permutation(n, seed, epoch)


class TokenWindows:
    """The samples of a part of a corpus: windows of L + 1 tokens, each overlapping the next by one.

    Window i is tokens [i L, i L + L + 1) of the part, so that every token but the first is predicted exactly
    once an epoch; up to L tokens at the end are left out. Documents follow each other inside a window. The
    order of each epoch is its own, by `seed`; ids of samples are below `vocab_size`.

    Raises DataError: the part `split` holds less than one window.
    """

    def __init__(
        self, dataset: IndexedDataset, split: SplitRange, seq_length: int, seed: int, vocab_size: int
    ) -> None:
        self.dataset = dataset
        self.split = split
        self.seq_length = seq_length
        self.window_count = (len(split.tokens) - 1) // seq_length
        if self.window_count < 1:
            raise DataError(
                f"the {split.name} part of {dataset.prefix} has {len(split.tokens):,} tokens, one sample of "
                f"--seq-length {seq_length} needs {seq_length + 1:,}: give the part a larger share with "
                "--split (of --data-range a larger part), use a larger corpus or shorter sequences"
                + (", or --eval-iters 0 to train without validation" if split.name == "validation" else "")
            )
        self._seed = seed
        self._vocab_size = vocab_size

    def sample(self, k: int) -> npt.NDArray[np.int64]:
        """Return tokens of global sample `k`, counted from 0 over all epochs, [L + 1].

        Raises DataError where one of them is not an id of the vocabulary.
        """
        start = self._start(k)
        tokens = self.dataset.tokens(start, start + self.seq_length + 1)
        self.dataset.check_vocabulary(tokens, self._vocab_size)
        return tokens.astype(np.int64)

    def positions(self, k: int) -> npt.NDArray[np.int64]:
        """Return the place of each of the first L tokens of sample `k` in its document, [L].

        What a sample holds of a document that began before it counts from 0.
        """
        start = self._start(k)
        starts = self.dataset.document_starts(start, start + self.seq_length) - start
        places = np.arange(self.seq_length)
        begins = np.zeros_like(places)
        begins[starts] = starts
        return places - np.maximum.accumulate(begins)

    def _start(self, k: int) -> int:
        """Return where sample `k` begins in the token stream of the corpus."""
        epoch, index = divmod(k, self.window_count)
        window = permutation(self.window_count, self._seed, epoch)[index]
        return self.split.tokens.start + window * self.seq_length
