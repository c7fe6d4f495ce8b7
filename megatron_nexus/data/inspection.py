"""What a tokenized corpus holds: lengths, frequencies of tokens, whether its files keep their promises."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_nexus.data.corpus_description import CorpusDescription
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 24
BLOCK_DOCUMENTS = 1 << 20
SAMPLE_TOKENS = 64
COUNTED_TOKENS = 20_000_000
CHUNKS_AT_LEAST = 64
CHUNK_TOKENS_AT_MOST = 1 << 18


@dataclass(frozen=True)
class Bin:
    """Documents of `smallest` to `largest` tokens."""

    smallest: int
    largest: int
    documents: int


def length_histogram(lengths: npt.NDArray[np.int64]) -> list[Bin]:
    """Return how many documents, [D], have 0, 1, 2 to 3, 4 to 7, ... tokens, from the shortest on."""
    counts = np.zeros(65, dtype=np.int64)  # by the bits of the length: 0, 1, 2, 2, 3, 3, 3, 3, 4 ...
    for first in range(0, len(lengths), BLOCK_DOCUMENTS):
        block = lengths[first : first + BLOCK_DOCUMENTS]
        counts += np.bincount(np.where(block > 0, np.frexp(block)[1], 0), minlength=len(counts))
    found = np.flatnonzero(counts)
    return [
        Bin((1 << bits) // 2, max(0, (1 << bits) - 1), int(counts[bits]))
        for bits in range(int(found[0]), int(found[-1]) + 1)
    ]


def sample_documents(dataset: IndexedDataset, count: int) -> list[int]:
    """Return documents spread evenly over a corpus, at most `count`."""
    total = dataset.document_count
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def sample_text(dataset: IndexedDataset, document: int, tokenizer: Tokenizer) -> str | None:
    """Return how a document begins, decoded; None where the tokenizer does not have its ids."""
    start, stop = dataset.document_start(document), dataset.document_start(document + 1)
    ids = dataset.tokens(start, min(stop, start + SAMPLE_TOKENS)).tolist()
    return tokenizer.decode(ids) if all(0 <= token < tokenizer.vocab_size for token in ids) else None


def find_problems(
    dataset: IndexedDataset, description: CorpusDescription | None, tokenizer: Tokenizer | None
) -> list[str]:
    """Return what is wrong with a corpus; reads all of it, in 17M-token blocks, with 8 bytes a document.

    Checked are the ids against the vocabulary, the ends of the documents against the end token, and counts
    and tokenizer against the description; what is not known (no description, no tokenizer) is not checked.
    """
    problems: list[str] = []
    lengths = dataset.document_lengths
    if (lengths < 0).any():
        document = int(np.flatnonzero(lengths < 0)[0])
        return [f"document {document} has a negative length: the index is damaged; preprocess the text again"]
    known = description or tokenizer
    vocab_size = min(
        [source.vocab_size for source in (description, tokenizer) if source], default=np.iinfo(np.int64).max
    )
    foreign = 0
    for ids in _blocks(dataset):
        if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
            foreign += int(((ids >= vocab_size) | (ids < 0)).sum())
    if foreign:
        problems.append(
            f"{foreign:,} ids are not below the vocabulary size {vocab_size:,}: the corpus was written with "
            "another tokenizer"
        )
    if description is not None:
        for what, promised, found in (
            ("documents", description.documents, dataset.document_count),
            ("tokens", description.tokens, dataset.token_count),
        ):
            if promised != found:
                problems.append(
                    f"the .json promises {promised:,} {what}, the index has {found:,}: the files do not "
                    "belong together; copy all three again"
                )
        if tokenizer is not None and tokenizer.fingerprint != description.tokenizer_fingerprint:
            problems.append(
                f"the corpus was written with another tokenizer ({description.tokenizer}) than "
                f"{tokenizer.model_path}: give that one"
            )
    if known is not None and (description is None or description.append_eod):
        missing = _count_elsewhere(dataset, lengths, -1, known.eod_id)
        if missing:
            problems.append(
                f"{missing:,} documents do not end with the end token {known.eod_id}: preprocess the text "
                "again with --append-eod, if the model is to learn where documents end"
            )
    if description is not None and description.prepend_bos:
        missing = _count_elsewhere(dataset, lengths, 0, description.bos_id)
        if missing:
            problems.append(
                f"{missing:,} documents do not begin with the BOS token {description.bos_id}, as the .json "
                "says: the files do not belong together; copy all three again"
            )
    return problems


def count_token(dataset: IndexedDataset, token: int) -> int:
    """Return how often a token stands in a corpus; reads all of it, in blocks."""
    return sum(int(np.count_nonzero(ids == token)) for ids in _blocks(dataset))


def _blocks(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    for first in range(0, dataset.token_count, BLOCK_TOKENS):
        yield dataset.tokens(first, min(first + BLOCK_TOKENS, dataset.token_count))


def _count_elsewhere(
    dataset: IndexedDataset, lengths: npt.NDArray[np.int64], place: int, token: int | None
) -> int:
    """Count the documents that have another token at their first place (0) or their last (-1)."""
    stream, others, end = dataset.tokens(0, dataset.token_count), 0, 0
    for first in range(0, len(lengths), BLOCK_DOCUMENTS):
        block = lengths[first : first + BLOCK_DOCUMENTS]
        ends = end + np.cumsum(block)
        places = (ends - 1 if place else ends - block)[block > 0]
        others += int((stream[places] != token).sum())
        end = int(ends[-1])
    return others


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
    return counts / counts.sum()
