"""Scores: the log-likelihood of a continuation of a context, and the protocol of what computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_nexus.errors import DataError

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A continuation to be scored; neither part is empty."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest there."""

    log_likelihood: float
    greedy: bool


class Scorer(Protocol):
    """A model that scores, wherever it runs."""

    seq_length: int
    """Tokens that it sees at once, at most."""

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request. Raises DataError where a continuation is too long."""
        ...


def fit(request: Request, seq_length: int) -> Request:
    """Return a request whose context is cut on the left so that a model of `seq_length` tokens reads it.

    The last token is scored, not read. Raises DataError where the continuation alone is longer.
    """
    assert request.context and request.continuation, f"an empty part: {request}"
    length = len(request.continuation)
    if length > seq_length:
        raise DataError(
            f"a continuation of {length} tokens cannot be scored by a model that sees {seq_length}: leave "
            "its item out, or choose a model of longer samples"
        )
    return Request(request.context[-(seq_length + 1 - length) :], request.continuation)
