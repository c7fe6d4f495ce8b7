"""SentencePiece tokenizers: reading any, training byte-fallback BPE that loses nothing.

A tokenizer trained here gives back every text exactly: `decode(encode(text)) == text`, tabs, CRLF, emoji and
NUL included, because nothing is normalized, blanks are kept and what no piece covers is spelt in bytes.
Only lone surrogates, which UTF-8 cannot hold, are refused.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_nexus.base.durable import atomic_file
from megatron_nexus.data.tokenizer_settings import (
    TOKENIZER_CONFIG,
    WithBos,
    special_token,
    tokenizer_settings,
)
from megatron_nexus.errors import DataError, os_errors_as

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space inside its pieces."""

INDENTS = (0, 3, 7, 11, 15, 19)
"""Blanks after a line break that are one piece with it. One less than the usual indents, because the last
blank belongs to the word that follows; saves 6 % of the tokens of the Python standard library."""

LINE_BREAKS = (*(breaks + BLANK * indent for breaks in ("\n", "\n\n") for indent in INDENTS), "\n\n\n")

TRAINING_THREADS = 4
"""Fixed, not the number of cores: SentencePiece stores it in the model, and one corpus gives one file."""

SILENT = 2
LONGEST_LINE_BYTES = 16_384
MOST_PIECES = 2**31 - 1


class SentencePieceTokenizer(WithBos):
    """Text to token ids and back, through a SentencePiece model file.

    `lossless` says whether the model gives every text back. All models of `train_sentencepiece_bpe` do;
    others may normalize, drop blanks or add one, and `bytes_per_token` is then an approximation.

    Raises DataError: the file is missing, is not a SentencePiece model, or the model has no end piece.
    """

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        remedy = "give the path of a SentencePiece .model file"
        with os_errors_as(DataError, f"the tokenizer model {model_path} cannot be read", remedy):
            model = model_path.read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            # Empty bytes would be taken for "no model given".
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
        except RuntimeError:
            raise DataError(
                f"the tokenizer model {model_path} ({len(model)} bytes) is not a SentencePiece model: "
                "it is damaged or of another kind; copy or train it again"
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(
                f"the tokenizer model {model_path} has no end piece, which must stand between documents: "
                "train it with eos_id"
            )
        self.unk_id: int | None = self._processor.unk_id()
        self.bos_id, self.document_prefix = self._beginning_of_text()
        blank_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        self.lossless = (
            all(map(self._processor.is_byte, blank_bytes))
            # A ligature, which the usual normalizations take apart, between blanks, which some strip.
            and self._processor.normalize(" \ufb01  ") == f"{BLANK}\ufb01{BLANK * 2}"
        )
        self._blank_bytes = blank_bytes

    def _beginning_of_text(self) -> tuple[int | None, tuple[int, ...]]:
        """Return the model's BOS piece; it begins documents where the file next to the model says so.

        A model of its own does not say whether: the file is `tokenizer_config.json`, as of a Llama's folder.
        """
        settings = tokenizer_settings(self.model_path, TOKENIZER_CONFIG)
        token: int = self._processor.bos_id()
        named = special_token(self.model_path, "bos_token", (TOKENIZER_CONFIG,))
        if named is not None:
            token = self._processor.piece_to_id(named[0])
            token = -1 if token == self._processor.unk_id() else token
        if token < 0 or (settings and named is None):
            return None, ()
        return token, (token,) if settings.get("add_bos_token") is True else ()

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text], threads=1)[0].tolist()

    def encode_documents(self, texts: list[str], threads: int) -> list[npt.NDArray[np.int32]]:
        for text in texts:
            if not text.isascii():
                require_unicode(text)
        documents: list[npt.NDArray[np.int32]] = self._processor.encode(
            texts, num_threads=threads, return_type="numpy"
        )
        if self.lossless:
            for number, text in enumerate(texts):
                if BLANK in text:
                    documents[number] = self._encode_with_blanks(text)
        return documents

    def _encode_with_blanks(self, text: str) -> npt.NDArray[np.int32]:
        """Spell SentencePiece's own blank character in bytes: as a piece it would come back as a space."""
        stretches: list[list[int]] = self._processor.encode(text.split(BLANK))
        ids = stretches[0]
        for stretch in stretches[1:]:
            ids += self._blank_bytes + stretch
        return np.array(ids, dtype=np.int32)

    def token_text(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        return np.array([self._byte_count(token) for token in range(self.vocab_size)], dtype=np.int64)

    def _byte_count(self, token: int) -> int:
        processor = self._processor
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return 0
        if processor.is_byte(token):
            return 1
        piece: str = processor.id_to_piece(token)
        return len(piece.replace(BLANK, " ").encode())


def train_sentencepiece_bpe(
    documents: Iterable[str], model_path: Path, vocab_size: int, sample_bytes: int = 16_000_000
) -> None:
    """Train a lossless byte-fallback BPE model on a sample of `documents` and write it to `model_path`.

    The sample is the documents of the smallest hashes, `sample_bytes` together: the same documents give the
    same file, in whatever order they come. Lines above 16 KiB are left out of it. 16 MB take about five
    seconds on two cores; training is silent, so wrap it in `log.Progress`.

    Raises DataError: there is no text, a text holds lone surrogates, or the vocabulary is too small for the
    characters or too large for the text; OSError: the file cannot be written.
    """
    if vocab_size > MOST_PIECES:
        raise DataError(
            f"--vocab-size {vocab_size} is beyond the {MOST_PIECES:,} pieces that SentencePiece counts: "
            "give fewer"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                line for text in _sample(documents, sample_bytes) for line in text.split("\n") if line
            ),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(LINE_BREAKS),
            character_coverage=0.9995,
            max_sentence_length=LONGEST_LINE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=TRAINING_THREADS,
            minloglevel=SILENT,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "no text to train on"
        too_few = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", reason)
        if too_few:
            given, needed = too_few.groups()
            raise DataError(
                f"--vocab-size {given} is below the {needed} pieces that the characters of this corpus need: "
                f"give at least {needed}"
            ) from None
        raise DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this corpus ({reason}): "
            "choose another --vocab-size or a larger corpus"
        ) from None
    with atomic_file(model_path) as write:
        write(model.getvalue())


def _sample(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Return the documents of the smallest hashes that fit `sample_bytes` (one at least), by hash."""
    kept: list[tuple[int, str]] = []  # a heap, the largest hash first
    kept_bytes = 0
    smallest_dropped = 1 << 64
    for text in documents:
        utf8 = require_unicode(text)
        priority = int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest())
        # What is dropped closes the sample behind it, or a later and smaller document would slip in.
        if priority >= smallest_dropped:
            continue
        heapq.heappush(kept, (-priority, text))
        kept_bytes += len(utf8)
        while kept_bytes > sample_bytes and len(kept) > 1:
            priority, dropped = heapq.heappop(kept)
            smallest_dropped = -priority
            kept_bytes -= len(dropped.encode())
    return [text for _, text in sorted(kept, reverse=True)]


def require_unicode(text: str) -> bytes:
    """Return the UTF-8 bytes of a text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise DataError(
            f"a document holds the lone surrogate {text[error.start]!r} (in {around!r}), which is no "
            'character: decode the source with errors="replace" or drop the document'
        ) from None
