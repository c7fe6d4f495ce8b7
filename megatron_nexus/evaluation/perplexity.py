"""Perplexity of a held-out text, per token, word and byte.

A text longer than the model's samples is read in windows. Each window predicts the next `stride` tokens and
sees as much of what comes before them as fits; the first one begins behind an end-of-document token. With
the largest stride, a whole sample, windows lie side by side but for the last, which reaches back to be a
whole one: this is what lm-evaluation-harness calls rolling log-likelihood. A smaller stride gives each
token more context, costs seq_length / stride times as much, and gives a lower perplexity.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_nexus.data.tokenizer import Tokenizer, context_id, encode_prompt
from megatron_nexus.errors import CheckpointError, DataError
from megatron_nexus.models.scores import Request, Scorer


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text: its log-likelihood in nats, and what it is a sum over."""

    log_likelihood: float
    tokens: int
    words: int
    """Stretches between white space, as lm-evaluation-harness counts them."""
    bytes: int

    @property
    def per_token(self) -> float:
        """exp of the mean loss of a token; comparable between models of one tokenizer only."""
        return _exp(-self.log_likelihood / self.tokens)

    @property
    def per_word(self) -> float:
        """exp of the loss of a word, infinite where that is beyond a float."""
        return _exp(-self.log_likelihood / self.words)

    @property
    def per_byte(self) -> float:
        """exp of the mean loss of a byte."""
        return _exp(-self.log_likelihood / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """The mean loss of a byte, in bits."""
        return -self.log_likelihood / self.bytes / math.log(2.0)

    @property
    def record(self) -> dict[str, float]:
        """All of it, for JSON."""
        derived = ("per_token", "per_word", "per_byte", "bits_per_byte")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        return (
            f"perplexity {self.per_token:.4g} per token, {self.per_word:.4g} per word, {self.per_byte:.4g} "
            f"per byte ({self.bits_per_byte:.4f} bits per byte) over {self.tokens:,} tokens, "
            f"{self.words:,} words, {self.bytes:,} bytes"
        )


def _exp(loss: float) -> float:
    """Return exp of a loss in nats, infinity where a float overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


def windows(tokens: Sequence[int], first: int, seq_length: int, stride: int) -> list[Request]:
    """Return the windows of a text: each token is scored once, none without context; `first` comes first."""
    row = [first, *tokens]
    made = []
    begin = 1
    while begin < len(row):
        # Nothing has been seen before the first window: it predicts all that it holds.
        end = min(len(row), begin + (seq_length if begin == 1 else stride))
        made.append(Request(tuple(row[max(0, end - 1 - seq_length) : begin]), tuple(row[begin:end])))
        begin = end
    return made


def measure_perplexity(scorer: Scorer, tokenizer: Tokenizer, text: str, stride: int = 0) -> Perplexity:
    """Return the perplexity of a text, one document. `stride` 0 means a whole sample.

    Raises:
        DataError: the text is empty, or the stride longer than a sample.
        CheckpointError: what the model computes is not finite, or the perplexity is not.
    """
    if not text:
        raise DataError("the text to measure perplexity on is empty: give a file with text")
    if stride > scorer.seq_length:
        raise DataError(
            f"--perplexity-stride {stride} is more than the {scorer.seq_length} tokens that the model sees "
            f"at once: use at most {scorer.seq_length}"
        )
    # As the harness' hf backend has it: what begins every document is predicted, too.
    tokens = encode_prompt(tokenizer, text)
    requests = windows(tokens, context_id(tokenizer), scorer.seq_length, stride or scorer.seq_length)
    total = sum(score.log_likelihood for score in scorer.score(requests))
    found = Perplexity(total, len(tokens), len(re.split(r"\s+", text)), len(text.encode()))
    if not math.isfinite(found.per_token):
        raise CheckpointError(
            f"the loss is {-total / len(tokens):.3g} nats per token, whose perplexity is beyond a float: the "
            "model has diverged; load an earlier checkpoint"
        )
    return found
