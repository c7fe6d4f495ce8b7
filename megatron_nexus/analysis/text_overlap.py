"""What the texts of samples have in common with the queries: near-duplicates, questions of their kind."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log, sqrt

import numpy as np

from megatron_nexus.data.answers import Answer

SHINGLE_WORDS = 3
NEAR_DUPLICATE = 0.8
"""Jaccard index of the shingles of two texts from which they count as one."""
KIND_PERCENTILE = 95.0
"""Percentile of the corpus's likeness to the queries: a sample above it is of their kind."""
_WORD = re.compile(r"\w+")

Shingles = frozenset[tuple[str, ...]]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _shingles(text: str) -> Shingles:
    words = _words(text)
    size = min(SHINGLE_WORDS, len(words))
    return (
        frozenset(tuple(words[i : i + size]) for i in range(len(words) - size + 1)) if size else frozenset()
    )


def _jaccard(one: Shingles, other: Shingles) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0


class NearDuplicates:
    """Tells samples of which prompt and answer are almost those of a query."""

    def __init__(self, queries: Sequence[Answer]) -> None:
        self._queries = [(_shingles(q.prompt or ""), _shingles(q.answer), _shingles(q.text)) for q in queries]

    def has(self, sample: Answer) -> bool:
        """Return whether a sample is a near-duplicate; a text is compared with prompt and answer together."""
        if sample.prompt is None:
            whole = _shingles(sample.text)
            return any(_jaccard(whole, text) >= NEAR_DUPLICATE for _, _, text in self._queries)
        parts = _shingles(sample.prompt), _shingles(sample.answer)
        return any(
            _jaccard(parts[0], prompt) >= NEAR_DUPLICATE and _jaccard(parts[1], answer) >= NEAR_DUPLICATE
            for prompt, answer, _ in self._queries
        )


class QueryKind:
    """Tells samples that ask what the queries ask: tf-idf cosine of prompts, of texts where there are none.

    The threshold is a percentile of `background`, samples drawn from the corpus.
    """

    def __init__(self, queries: Sequence[Answer], background: Sequence[Answer]) -> None:
        self._documents = len(background)
        self._containing = Counter(word for sample in background for word in set(_words(_question(sample))))
        self._queries = [self._vector(query) for query in queries]
        self._threshold = float(np.percentile([*map(self._likeness, background)], KIND_PERCENTILE))

    def _vector(self, sample: Answer) -> dict[str, float]:
        counts = Counter(_words(_question(sample)))
        weights = {
            word: count * log((1 + self._documents) / (1 + self._containing[word]))
            for word, count in counts.items()
        }
        length = sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()} if length else {}

    def _likeness(self, sample: Answer) -> float:
        own = self._vector(sample)
        return max(
            sum(weight * query.get(word, 0.0) for word, weight in own.items()) for query in self._queries
        )

    def share(self, samples: Iterable[Answer]) -> float:
        """Return the share of samples that are more like a query than 95 % of the background; 0 of none."""
        alike = [self._likeness(sample) > self._threshold for sample in samples]
        return sum(alike) / len(alike) if alike else 0.0


def _question(sample: Answer) -> str:
    return sample.text if sample.prompt is None else sample.prompt
