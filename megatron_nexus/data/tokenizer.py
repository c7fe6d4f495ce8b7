"""What a tokenizer is to everybody else, and how one is opened from its file."""

from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.errors import DataError

JSON_NAME, MODEL_NAME = "tokenizer.json", "tokenizer.model"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    model_path: Path
    """The file it was read from."""
    fingerprint: str
    """sha256, in hexadecimal, of all that decides the meaning of an id."""
    vocab_size: int
    """Every id is below it."""
    eod_id: int
    """The token that stands at the end of every document."""
    bos_id: int | None
    """The token that begins a text; None where the files name none, or the model does not know it."""
    document_prefix: tuple[int, ...]
    """The tokens that begin every document and prompt: BOS, or none."""
    unk_id: int | None
    """The token of what the vocabulary does not cover, where there is one."""
    lossless: bool
    """Whether decoding gives every text back; `bytes_per_token` is an approximation where not."""

    def with_bos(self, prepend: bool) -> Self:
        """Return the same tokenizer for a model whose documents begin with BOS, or never do.

        Raises DataError where they are to and the files name no BOS token.
        """

    def encode(self, text: str) -> list[int]:
        """Return token ids of a text; no BOS, no end token. Raises DataError on lone surrogates."""

    def encode_documents(self, texts: list[str], threads: int) -> list[npt.NDArray[np.int32]]:
        """Return token ids of each text, by `threads` threads; no BOS, no end tokens. Raises as `encode`."""

    def token_text(self, token: int) -> str:
        """Return how the tokenizer's files spell a token."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; control tokens are silent, cut-off characters become U+FFFD."""

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the UTF-8 bytes that each id stands for, [vocab_size]; control tokens stand for none."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text to continue, which begin as training documents do; never empty."""
    return [*tokenizer.document_prefix, *tokenizer.encode(text)] or [context_id(tokenizer)]


def context_id(tokenizer: Tokenizer) -> int:
    """Return what stands before a text without context: BOS, or the end of the document before."""
    return tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id


def open_tokenizer(path: Path, prepend_bos: bool | None = None) -> Tokenizer:
    """Return the tokenizer of a file: a Hugging Face `tokenizer.json`, or a SentencePiece model.

    Of a folder: its `tokenizer.json`, or, where it has none, its `tokenizer.model`. `prepend_bos`: whether
    documents begin with BOS; None: as the tokenizer's own files say.

    Raises DataError: the file is missing or of no known kind, no token can end a document, none is known to
    begin one, or the package `tokenizers` is needed and not installed.
    """
    tokenizer = _open(path)
    return tokenizer if prepend_bos is None else tokenizer.with_bos(prepend_bos)


def _open(path: Path) -> Tokenizer:
    if path.is_dir():
        found = [path / name for name in (JSON_NAME, MODEL_NAME) if (path / name).is_file()]
        if not found:
            raise DataError(
                f"the folder {path} holds no {JSON_NAME}: name a folder that does, or a SentencePiece "
                ".model file"
            )
        path = found[0]
    if path.suffix != ".json":
        return SentencePieceTokenizer(path)
    try:
        from megatron_nexus.data.huggingface_tokenizer import HuggingFaceTokenizer
    except ImportError:
        raise DataError(
            f"{path} needs the package tokenizers, which is not installed: pip install tokenizers"
        ) from None
    return HuggingFaceTokenizer(path)
