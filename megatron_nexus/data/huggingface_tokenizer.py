"""Hugging Face tokenizers: a `tokenizer.json`, read by the package `tokenizers`.

The file does not say which token ends a document. That stands next to it, in `tokenizer_config.json` or
`special_tokens_map.json`; where neither names one, the one customary name among its special tokens is taken.

The text of a document is only ever text: `<|endoftext|>` written in it is spelt out in ordinary tokens.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_nexus.data.sentencepiece_tokenizer import BLANK, require_unicode
from megatron_nexus.data.tokenizer_settings import (
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    WithBos,
    special_token,
)
from megatron_nexus.errors import DataError, os_errors_as

CONFIGS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
CUSTOMARY_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
PROBE = " \ufb01  e\u0301 \u00e9\t\r\nA \U0001f600 \u3000 .  ,"
"""What normalizations take apart, compose or fold, between blanks that some strip or merge."""
EVERY_BYTE = "".join(
    map(
        chr,
        (
            *range(0xC0),
            *range(0xC0, 0x800, 0x40),
            *range(0x800, 0x1000, 0x800),
            *range(0x1000, 0x10000, 0x1000),
            0x10000,
            *range(0x40000, 0x110000, 0x40000),
        ),
    )
)
"""Characters that have, between them, every byte that UTF-8 uses: a vocabulary may lack some."""


class HuggingFaceTokenizer(WithBos):
    """Text to token ids and back, through a `tokenizer.json`; see `Tokenizer` for the fields.

    Raises DataError: the file is missing or is not a tokenizer, or no token is known to end a document.
    """

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        remedy = "give the path of a tokenizer.json or of a SentencePiece .model file"
        with os_errors_as(DataError, f"the tokenizer {model_path} cannot be read", remedy):
            model = model_path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # noqa: BLE001 - the library raises nothing more special
            raise DataError(
                f"the tokenizer {model_path} ({len(model)} bytes) is not a tokenizer.json: {error}; it is "
                "damaged or of another kind, copy it again"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._end_of_document()
        self.fingerprint = hashlib.sha256(model + f"end {self.eod_id}".encode()).hexdigest()
        self.document_prefix = self._document_prefix()
        self.bos_id = self._beginning_of_text()
        self.unk_id = self._unknown()
        self.lossless: bool = all(self.decode(self.encode(probe)) == probe for probe in (PROBE, EVERY_BYTE))

    def _end_of_document(self) -> int:
        named = special_token(self.model_path, "eos_token", CONFIGS)
        if named is not None:
            content, file = named
            token: int | None = self._tokenizer.token_to_id(content)
            if token is None:
                raise DataError(
                    f"{file} names the eos_token {content!r}, which {self.model_path.name} does not have: "
                    "use the two files of one tokenizer"
                )
            return token
        special = {token.content: number for number, token in self._added.items() if token.special}
        ends = [name for name in CUSTOMARY_ENDS if name in special]
        if len(ends) != 1:
            raise DataError(
                f"the tokenizer {self.model_path} does not say which token ends a document (it has "
                f"{', '.join(ends) or 'none of the customary ones'}): put a tokenizer_config.json with an "
                '"eos_token" next to it'
            )
        return int(special[ends[0]])

    def _document_prefix(self) -> tuple[int, ...]:
        """Return the tokens that the post-processor puts before a text; transformers goes by it, too."""
        encoding = self._tokenizer.encode("a")
        text_begins = next(
            (i for i, added in enumerate(encoding.special_tokens_mask) if not added), len(encoding.ids)
        )
        return tuple(encoding.ids[:text_begins])

    def _beginning_of_text(self) -> int | None:
        """Return the BOS token that the files name, or else the one that the post-processor adds."""
        named = special_token(self.model_path, "bos_token", CONFIGS)
        token: int | None = self._tokenizer.token_to_id(named[0]) if named else None
        return token if token is not None or not self.document_prefix else self.document_prefix[0]

    def _unknown(self) -> int | None:
        model = self._tokenizer.model
        if isinstance(model, tokenizers.models.Unigram):
            stored = json.loads(self._tokenizer.to_str())["model"]["unk_id"]
            return None if stored is None else int(stored)
        return self._tokenizer.token_to_id(model.unk_token or "")

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text], threads=1)[0].tolist()

    def encode_documents(self, texts: list[str], threads: int) -> list[npt.NDArray[np.int32]]:
        """Return token ids of each text; no end tokens. Raises as `encode`.

        The library's own pool works where `threads` is above 1, of the size that RAYON_NUM_THREADS says.
        """
        for text in texts:
            require_unicode(text)
        # One by one is a call each without the pool; "fast" leaves offsets out.
        batches = [texts] if threads > 1 else [[text] for text in texts]
        return [
            np.array(encoding.ids, dtype=np.int32)
            for batch in batches
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]

    def token_text(self, token: int) -> str:
        text: str | None = self._tokenizer.id_to_token(token)
        assert text is not None, f"{self.model_path} has no token {token}"
        return text

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the UTF-8 bytes that each id stands for, [vocab_size]; exact for byte-level models."""
        stored = json.loads(self._tokenizer.to_str())
        decoders = stored["decoder"] or {}
        kinds = {decoder["type"] for decoder in decoders.get("decoders", [decoders]) if decoder}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token in self._added:
                added = self._added[token]
                sizes[token] = 0 if added.special else len(added.content.encode())
            elif "ByteLevel" in kinds:
                sizes[token] = len(piece)  # each byte is spelt as one character
            elif "ByteFallback" in kinds and piece.startswith("<0x"):
                sizes[token] = 1
            else:
                piece = piece.removeprefix("##") if "WordPiece" in kinds else piece.replace(BLANK, " ")
                sizes[token] = len(piece.encode())
        sizes[list(self.document_prefix)] = 0  # which may be no special token
        return sizes
