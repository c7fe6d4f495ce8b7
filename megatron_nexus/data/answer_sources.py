"""The samples of a corpus to search: prompts with answers of .jsonl files, or the documents of a .bin/.idx.

Documents that are longer than a sample of the model are cut into pieces, each with the token before it as
context.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_nexus.data.answers import Answer, AnswerTokens, read_answers, tokenize_answer
from megatron_nexus.data.corpus_description import check_tokenizer
from megatron_nexus.data.indexed_dataset import IndexedDataset, idx_path
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.log import Progress

ENDING = ".jsonl"


class AnswerSource(Protocol):
    """Samples by number."""

    cut: int
    """Samples of which a part was cut off."""

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of all that decides the samples' tokens."""

    def __len__(self) -> int: ...
    def tokens(self, number: int) -> AnswerTokens:
        """Return the token ids of a sample."""

    def answer(self, number: int) -> Answer:
        """Return the text of a sample."""


class AnswerFiles:
    """The lines of .jsonl files, all in memory as text."""

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer, seq_length: int) -> None:
        """Read the files and tokenize each line once. Raises DataError: a line cannot be a sample."""
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._answers = [answer for path in paths for answer in read_answers(path)]
        self.cut = 0
        # A line that cannot be is to be known now, not after hours.
        with Progress("tokenizing", len(self._answers), "lines", after_s=2.0) as progress:
            for answer in self._answers:
                self.cut += tokenize_answer(answer, tokenizer, seq_length)[1] > 0
                progress.advance(1)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._tokenizer.fingerprint} {self._seq_length}".encode())
        for answer in self._answers:
            digest.update(repr(answer.fields()).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._answers)

    def tokens(self, number: int) -> AnswerTokens:
        return tokenize_answer(self._answers[number], self._tokenizer, self._seq_length)[0]

    def answer(self, number: int) -> Answer:
        return self._answers[number]


class DocumentPieces:
    """The documents of a tokenized corpus in pieces of at most a sample's length; 8 bytes a document."""

    cut = 0

    def __init__(self, prefix: Path, tokenizer: Tokenizer, seq_length: int, vocab_size: int) -> None:
        """Raises DataError: missing, damaged, of another tokenizer, or without a document of two tokens."""
        self._dataset = IndexedDataset(prefix)
        check_tokenizer(prefix, tokenizer)
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        # A document of one token has none to predict.
        pieces = -(-np.maximum(self._dataset.document_lengths - 1, 0) // seq_length)
        self._ends = np.cumsum(pieces)
        if not len(self):
            raise DataError(f"{prefix} has no document of two tokens: preprocess one with texts")

    @cached_property
    def fingerprint(self) -> str:
        facts = [self._dataset.fingerprint, self._tokenizer.fingerprint, str(self._seq_length)]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _ids(self, number: int) -> list[int]:
        document = int(np.searchsorted(self._ends, number, side="right"))
        piece = number - (int(self._ends[document - 1]) if document else 0)
        start = self._dataset.document_start(document) + piece * self._seq_length
        stop = min(start + self._seq_length + 1, self._dataset.document_start(document + 1))
        ids = self._dataset.tokens(start, stop)
        self._dataset.check_vocabulary(ids, self._vocab_size)
        return [int(token) for token in ids]

    def tokens(self, number: int) -> AnswerTokens:
        return AnswerTokens(tuple(self._ids(number)), 1)

    def answer(self, number: int) -> Answer:
        return Answer(None, self._tokenizer.decode(self._ids(number)), f"sample {number:,}")


def open_answer_source(
    names: Sequence[str], tokenizer: Tokenizer, seq_length: int, vocab_size: int
) -> AnswerSource:
    """Open .jsonl files, or the one corpus whose files begin with a prefix; `require_corpus` has let them in.

    Raises DataError: as the two kinds say.
    """
    if names[0].endswith(ENDING):
        return AnswerFiles([Path(name) for name in names], tokenizer, seq_length)
    return DocumentPieces(Path(names[0]), tokenizer, seq_length, vocab_size)


def require_corpus(names: Sequence[str]) -> None:
    """Raise ConfigError, DataError or OSError where `open_answer_source` cannot open what --corpus names."""
    for name in names:
        if name.endswith(ENDING):
            Path(name).stat()
    if all(name.endswith(ENDING) for name in names):
        return
    if len(names) > 1:
        raise ConfigError(
            f"--corpus {' '.join(names)}: give {ENDING} files, or the prefix of one .bin/.idx pair"
        )
    if not idx_path(Path(names[0])).exists():
        raise DataError(
            f"--corpus {names[0]} is no {ENDING} file, and {idx_path(Path(names[0]))} does not exist: give "
            f"{ENDING} files, or the prefix of a .bin/.idx pair"
        )
