"""The unigram entropy is that of the counts."""

from math import log
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_nexus.data.inspection import entropy, unigram_frequencies
from megatron_nexus.errors import DataError


def corpus(prefix: Path, ids: np.ndarray) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(ids)
    return IndexedDataset(prefix)


def test_the_entropy_of_known_frequencies(tmp_path: Path) -> None:
    dataset = corpus(tmp_path / "c", np.array([0] * 4 + [1] * 2 + [7] * 2 + [9] * 100))
    assert entropy(unigram_frequencies(dataset, 0, 8, 10)) == pytest.approx(1.5 * log(2))
    assert entropy(unigram_frequencies(dataset, 8, 108, 10)) == 0


def test_a_sample_of_a_large_corpus_sees_all_of_it(tmp_path: Path) -> None:
    """Ids that grow along the corpus: counting its beginning only would find no entropy at all.

    Each of the four has 16 or 17 of the 64 to 67 chunks, which costs less than 0.1 % of the entropy.
    """
    dataset = corpus(tmp_path / "c", np.repeat(np.arange(4), 1_000_000))
    assert entropy(unigram_frequencies(dataset, 0, 4_000_000, 4, max_tokens=400)) == pytest.approx(
        log(4), rel=1e-3
    )
    assert entropy(unigram_frequencies(dataset, 0, 4_000_000, 4)) == pytest.approx(log(4))


def test_foreign_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 7"):
        unigram_frequencies(corpus(tmp_path / "c", np.array([1, 7])), 0, 2, vocab_size=7)
