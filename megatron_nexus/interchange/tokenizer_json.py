"""A SentencePiece BPE as a Hugging Face `tokenizer.json` that gives the same ids.

SentencePiece joins the two neighbours whose union is the piece of the highest score; `tokenizers` those
that stand first in a list of pairs. The list is every way to cut a piece in two, by score. What a model
never joins (its user-defined pieces) are added tokens; what no piece covers is spelt in bytes by both.

A model that keeps every text as it is has real blanks in the exported vocabulary, so that U+2581 in a text
is spelt in bytes, as `SentencePieceTokenizer` does; others write a blank as U+2581 and confuse the two.
"""

import base64
import json
from collections.abc import Sequence

from megatron_nexus.data.sentencepiece_tokenizer import BLANK
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.architecture import JsonObject
from megatron_nexus.interchange.post_processor import Special, beginning_with
from megatron_nexus.interchange.sentencepiece_model import Kind, ModelType, SentencePieceModel


def tokenizer_json(model: SentencePieceModel, prefix: Sequence[Special] = ()) -> str:
    """Return the text of the file. Raises DataError where `tokenizers` has no equivalent.

    `prefix` are the special tokens that begin every text.
    """
    problems = []
    if model.model_type is not ModelType.BPE:
        problems.append(f"is of the kind {model.model_type.name.lower()}, and only BPE can be exported")
    if model.blanks_end_words:
        problems.append("puts the blank at the end of words")
    if not model.escapes_blanks:
        problems.append("keeps blanks unescaped")
    if model.adds_dummy_prefix and any(piece.kind is Kind.USER_DEFINED for piece in model.pieces):
        problems.append("adds a blank before a text and has user-defined pieces")
    if any(piece.kind is Kind.UNUSED for piece in model.pieces):
        problems.append("has unused pieces, which it takes apart again")
    if problems:
        raise DataError(
            f"no tokenizer.json gives the ids of this SentencePiece model: it {', '.join(problems)}"
        )
    keeps_blanks = not (model.adds_dummy_prefix or model.removes_extra_blanks or model.character_map)
    blank = " " if keeps_blanks and model.byte_fallback else BLANK
    texts = [
        piece.text.replace(BLANK, " " if piece.kind is Kind.USER_DEFINED else blank) for piece in model.pieces
    ]
    return bpe_json(
        texts,
        [piece.kind for piece in model.pieces],
        _merges(model, texts),
        steps={
            "normalizer": _normalizer(model, blank),
            "pre_tokenizer": None,
            "post_processor": beginning_with(None, prefix) if prefix else None,
            "decoder": _decoder(model, blank),
        },
        settings={
            "unk_token": next(piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN),
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
        },
    )


def bpe_json(
    texts: Sequence[str],
    kinds: Sequence[Kind],
    merges: Sequence[object],
    steps: JsonObject,
    settings: JsonObject,
) -> str:
    """Return the text of the file of a BPE: its tokens by id, its merges in order.

    `steps` are what comes before and after the model, `settings` those of the model.
    """
    added = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
    record = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, text, special=kind is not Kind.USER_DEFINED)
            for token, (text, kind) in enumerate(zip(texts, kinds, strict=True))
            if kind in added
        ],
        **steps,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **settings,
            "vocab": {text: token for token, text in enumerate(texts)},
            "merges": merges,
        },
    }
    return json.dumps(record, ensure_ascii=False, indent=1)


def _merges(model: SentencePieceModel, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces: highest score first, splits of one piece by id."""
    ids = {text: i for i, text in enumerate(texts) if model.pieces[i].kind is Kind.NORMAL}
    cuts = [
        (-model.pieces[token].score, token, ids[text[:i]], ids[text[i:]])
        for text, token in ids.items()
        for i in range(1, len(text))
        if text[:i] in ids and text[i:] in ids
    ]
    return [(texts[left], texts[right]) for _, _, left, right in sorted(cuts)]


def _added_token(token: int, text: str, special: bool) -> JsonObject:
    """Return a token that is matched before all others; a special one is dropped when decoding."""
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _normalizer(model: SentencePieceModel, blank: str) -> JsonObject | None:
    steps: list[JsonObject] = []
    if model.character_map:
        text = base64.b64encode(model.character_map).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if model.removes_extra_blanks:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.adds_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if blank != " ":
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": blank})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(model: SentencePieceModel, blank: str) -> JsonObject:
    steps: list[JsonObject] = []
    if blank != " ":
        steps.append({"type": "Replace", "pattern": {"String": BLANK}, "content": " "})
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.adds_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
