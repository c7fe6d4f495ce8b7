"""Hugging Face tokenizers: a `tokenizer.json`, read by the package `tokenizers`.

The file does not say which token ends a document. That stands beside it, in `tokenizer_config.json` or
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
from megatron_nexus.errors import DataError

CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
CUSTOMARY_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
PROBE = " \ufb01  e\u0301 \u00e9\t\r\nA \U0001f600 \u3000 .  ,"
"""What normalizations take apart, compose or fold, between blanks that some strip or merge."""


class HuggingFaceTokenizer:
    """Text to token ids and back, through a `tokenizer.json`; see `Tokenizer` for the fields.

    Raises:
        DataError: the file is missing or is no tokenizer, or no token is known to end a document.
    """

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        try:
            model = model_path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the tokenizer {model_path} cannot be read ({error.strerror}): give the path of a "
                "tokenizer.json or of a SentencePiece .model file"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # noqa: BLE001 - the library raises nothing more special
            raise DataError(
                f"the tokenizer {model_path} ({len(model)} bytes) is no tokenizer.json: {error}; it is "
                "damaged or of another kind, copy it again"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._end_of_document()
        self.fingerprint = hashlib.sha256(model + f"end {self.eod_id}".encode()).hexdigest()
        self.lossless: bool = self.decode(self.encode(PROBE)) == PROBE

    def _end_of_document(self) -> int:
        for name in CONFIGS:
            file = self.model_path.with_name(name)
            try:
                end = json.loads(file.read_bytes()).get("eos_token")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{file} cannot be read ({error}): copy it again or remove it") from None
            content = end.get("content") if isinstance(end, dict) else end
            if content is None:
                continue
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
                '"eos_token" beside it'
            )
        return int(special[ends[0]])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no end token. Raises DataError where the text holds lone surrogates."""
        require_unicode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: list[str], threads: int) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text; no end tokens. Raises as `encode`.

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

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens are silent, cut-off characters become U+FFFD."""
        text: str = self._tokenizer.decode(ids)
        return text

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, [vocab_size]; exact for byte-level models."""
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
        return sizes
