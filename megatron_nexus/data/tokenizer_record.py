"""What a checkpoint keeps of its tokenizer: which one it is, and whether its documents begin with BOS.

Not the tokenizer itself, which lies where the run's settings say, or with the built-in corpus.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of a model, as its checkpoint knows it; by default of one that is yet to be trained."""

    fingerprint: str = ""
    """`Tokenizer.fingerprint`; empty: the run knew no tokenizer."""
    prepend_bos: bool | None = None
    """Whether the documents began with BOS; None: as the tokenizer's own files say, as of an import."""
    built_in_pieces: int = 0
    """Vocabulary of the built-in corpus' tokenizer, trained to that which a model starts with."""


NO_RECORD = TokenizerRecord()
