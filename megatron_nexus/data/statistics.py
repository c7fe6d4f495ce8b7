"""What can be known of a corpus without a model."""

import numpy as np
import numpy.typing as npt

from megatron_nexus.data.indexed_dataset import IndexedDataset

COUNTED_TOKENS = 20_000_000
CHUNKS_AT_LEAST = 64
CHUNK_TOKENS_AT_MOST = 1 << 18


def entropy(frequencies: npt.NDArray[np.float64]) -> float:
    """Return the entropy of the token frequencies in nats per token: the loss without any context."""
    seen = frequencies[frequencies > 0]
    return float(-(seen * np.log(seen)).sum())


def unigram_frequencies(
    dataset: IndexedDataset, start: int, stop: int, vocab_size: int, max_tokens: int = COUNTED_TOKENS
) -> npt.NDArray[np.float64]:
    """Return the frequency of each id of the vocabulary, [vocab_size].

    Counts tokens [start, stop) of the stream; of more than `max_tokens`, chunks that lie evenly over them.

    Raises DataError: a token id lies outside the vocabulary.
    """
    assert start < stop and max_tokens > 0, (start, stop, max_tokens)
    chunk_tokens = max(1, min(CHUNK_TOKENS_AT_MOST, max_tokens // CHUNKS_AT_LEAST))
    stride = max(chunk_tokens, -(-(stop - start) * chunk_tokens // max_tokens))
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(start, stop, stride):
        ids = dataset.tokens(first, min(first + chunk_tokens, stop))
        dataset.check_vocabulary(ids, vocab_size)
        counts += np.bincount(ids, minlength=vocab_size)
    frequencies: npt.NDArray[np.float64] = counts / counts.sum()
    return frequencies
