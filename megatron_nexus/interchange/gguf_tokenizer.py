"""The tokenizer in a GGUF file's settings, as a Hugging Face `tokenizer.json`.

    gpt2    byte-level BPE: a list of merges, and by name how a text is cut into words before
    llama   SentencePiece BPE: a score for each piece

The expressions that cut words are those of the models' own tokenizer.json files; a name that is not listed
is refused, for no tokenizer can be guessed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_nexus.data.tokenizer import JSON_NAME
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.architecture import JsonObject
from megatron_nexus.interchange.post_processor import beginning_with
from megatron_nexus.interchange.sentencepiece_model import Kind, ModelType, Piece, SentencePieceModel
from megatron_nexus.interchange.tokenizer_files import CONFIG_NAME, write_json
from megatron_nexus.interchange.tokenizer_json import bpe_json, tokenizer_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> list[JsonObject]:
    pattern = f"{CONTRACTIONS}|{WORDS}|{numbers}|{REST}"
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


DIGITS: JsonObject = {"type": "Digits", "individual_digits": True}
# By llama.cpp's name: the steps before the bytes, and whether these follow GPT-2's own expression.
PRE_TOKENIZERS: dict[str, tuple[list[JsonObject], bool]] = {
    "gpt-2": ([], True),
    "smollm": ([DIGITS], True),
    "llama-bpe": (_split(r"\p{N}{1,3}"), False),
    "qwen2": (_split(r"\p{N}"), False),
}


def write_gguf_tokenizer(fields: Mapping[str, object], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises DataError where it is not known how; OSError."""
    kind = fields["tokenizer.ggml.model"]
    tokens, kinds = _texts(fields, "tokens"), [Kind(int(k)) for k in _array(fields, "token_type")]
    if kind == "gpt2":
        text = _byte_level(fields, tokens, kinds)
    elif kind == "llama":
        scores = [float(score) for score in _array(fields, "scores")]
        pieces = tuple(Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True))
        text = tokenizer_json(
            SentencePieceModel(
                pieces,
                ModelType.BPE,
                byte_fallback=Kind.BYTE in kinds,
                blanks_end_words=False,
                character_map=b"",
                adds_dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
                removes_extra_blanks=False,
                escapes_blanks=True,
            )
        )
    else:
        raise DataError(f"the GGUF file's tokenizer is of the kind {kind!r}, which is not known here")
    end = fields.get("tokenizer.ggml.eos_token_id")
    if not isinstance(end, int):
        raise DataError("the GGUF file's tokenizer names no end token (tokenizer.ggml.eos_token_id)")
    begin = fields.get("tokenizer.ggml.bos_token_id")
    if isinstance(begin, int) and _prepends_bos(fields):
        processor = beginning_with(None, [(tokens[begin], begin)])
        text = json.dumps(json.loads(text) | {"post_processor": processor}, ensure_ascii=False, indent=1)
    (folder / JSON_NAME).write_text(text, encoding="utf-8")
    record: JsonObject = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[end]}
    for name, key in {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}.items():
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            record[name] = tokens[token]
    record["clean_up_tokenization_spaces"] = False
    if "tokenizer.chat_template" in fields:
        record["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / CONFIG_NAME, record)


def _prepends_bos(fields: Mapping[str, object]) -> bool:
    """Return whether texts begin with BOS: as the file says, or as llama.cpp assumes for its kind."""
    by_kind = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(fields.get("tokenizer.ggml.add_bos_token", by_kind))


def _byte_level(fields: Mapping[str, object], tokens: Sequence[str], kinds: Sequence[Kind]) -> str:
    name = fields.get("tokenizer.ggml.pre", "nothing")
    if name not in PRE_TOKENIZERS:
        raise DataError(
            f"the GGUF file's tokenizer cuts words as {name!r} does, which is not known here (known: "
            f"{', '.join(PRE_TOKENIZERS)})"
        )
    steps, uses_expression = PRE_TOKENIZERS[str(name)]
    bytes_step: JsonObject = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": uses_expression,
    }
    return bpe_json(
        tokens,
        kinds,
        _texts(fields, "merges"),
        steps={
            "normalizer": {"type": "NFC"} if name == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_step]},
            "post_processor": None,
            "decoder": bytes_step,
        },
        settings={"ignore_merges": name == "llama-bpe"},
    )


def _array(fields: Mapping[str, object], name: str) -> list[float]:
    found = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list):
        raise DataError(
            f"the GGUF file's tokenizer has no {name}: it is incomplete; import without it: --no-tokenizer"
        )
    return found


def _texts(fields: Mapping[str, object], name: str) -> list[str]:
    return [str(text) for text in _array(fields, name)]
