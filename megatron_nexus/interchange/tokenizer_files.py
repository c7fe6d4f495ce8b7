"""The tokenizer of an export: the files by which transformers gives the same ids as training did.

A SentencePiece model becomes a `tokenizer.json`, which is compared with it on real text before it is kept;
what has a `tokenizer.json` already is copied with the settings next to it.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.data.tokenizer import JSON_NAME, MODEL_NAME, Tokenizer, open_tokenizer
from megatron_nexus.data.tokenizer_settings import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.architecture import JsonObject
from megatron_nexus.interchange.post_processor import Special, beginning_with
from megatron_nexus.interchange.sentencepiece_model import Kind, read_sentencepiece_model
from megatron_nexus.interchange.tokenizer_json import tokenizer_json

CONFIG_NAME = TOKENIZER_CONFIG
FAST_CLASS = "PreTrainedTokenizerFast"
COMPANIONS = (CONFIG_NAME, SPECIAL_TOKENS_MAP, "added_tokens.json", "chat_template.jinja")
COMPARED_LINES = 20_000


def require_convertible(tokenizer: Tokenizer | None) -> None:
    """Raise DataError where an export of `tokenizer` needs a package that is not installed."""
    if isinstance(tokenizer, SentencePieceTokenizer) and find_spec("tokenizers") is None:
        raise DataError(
            f"to export {tokenizer.model_path} as a {JSON_NAME} takes the package tokenizers, which is not "
            "installed: pip install tokenizers; or export without a tokenizer by --tokenizer-model none"
        )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> str:
    """Write the files of a tokenizer into `folder`; what was done, in words.

    `max_positions` is the tokens of the longest text that the model was trained on.

    Raises:
        DataError: a tokenizer.json cannot express it.
        OSError: a file cannot be written.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _convert(tokenizer, folder, max_positions)
    source = tokenizer.model_path
    own = open_tokenizer(source)
    for name in COMPANIONS:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)
    as_it_is = own.document_prefix == tokenizer.document_prefix
    if as_it_is:
        shutil.copyfile(source, folder / JSON_NAME)
        done = "as it is"
    else:
        record = json.loads(source.read_bytes())
        record["post_processor"] = beginning_with(record["post_processor"], _prefix(tokenizer))
        (folder / JSON_NAME).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        done = (
            f"{'with' if tokenizer.document_prefix else 'without'} BOS before a text, as the model is trained"
        )
    if not (folder / CONFIG_NAME).is_file():
        _write_config(folder, tokenizer, {}, max_positions)
    # Where BOS is the end token, it does no harm to name it so.
    elif not as_it_is or own.bos_id not in (tokenizer.bos_id, tokenizer.eod_id):
        _name_bos(folder, tokenizer)
    return f"{source}, {done}"


def _prefix(tokenizer: Tokenizer) -> list[Special]:
    return [(tokenizer.token_text(token), token) for token in tokenizer.document_prefix]


def _convert(tokenizer: SentencePieceTokenizer, folder: Path, max_positions: int) -> str:
    model = read_sentencepiece_model(tokenizer.model_path)
    (folder / JSON_NAME).write_text(tokenizer_json(model, _prefix(tokenizer)), encoding="utf-8")
    unknown = next(piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN)
    _write_config(folder, tokenizer, {"unk_token": unknown}, max_positions)
    shutil.copyfile(tokenizer.model_path, folder / MODEL_NAME)
    made = open_tokenizer(folder)
    compared = 0
    for text in real_lines(standard_library_documents(), COMPARED_LINES):
        expected, found = tokenizer.encode(text), made.encode(text)
        if expected != found:
            raise DataError(
                f"the tokenizer.json made of {tokenizer.model_path} gives {text!r} the ids {found}, not "
                f"{expected}: please report it; export without a tokenizer by --tokenizer-model none"
            )
        compared += 1
    return f"{tokenizer.model_path}, as a {JSON_NAME} that gives {compared:,} lines the same ids"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a folder that has a `tokenizer.json`: of an export, the model it was made of.

    Corpora that were tokenized by that model know it by its fingerprint. Raises OSError.
    """
    made = _is_conversion(source / JSON_NAME, source / MODEL_NAME)
    # What begins a text stands next to the model.
    for name in (MODEL_NAME, CONFIG_NAME) if made else (JSON_NAME, *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _is_conversion(record: Path, model: Path) -> bool:
    """Return whether a `tokenizer.json` is exactly what `_convert` makes of a SentencePiece model."""
    try:
        prefix = _prefix(SentencePieceTokenizer(model))
        return record.read_bytes() == tokenizer_json(read_sentencepiece_model(model), prefix).encode()
    except DataError:  # no such model, or none that could be converted
        return False


def _write_config(folder: Path, tokenizer: Tokenizer, tokens: dict[str, str], max_positions: int) -> None:
    end = tokenizer.token_text(tokenizer.eod_id)
    record: JsonObject = {"tokenizer_class": FAST_CLASS, "eos_token": end, **tokens}
    if tokenizer.bos_id is not None:
        record |= _bos_settings(tokenizer)
    record |= {
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # What a text spells is text: in training no text stood for a control token either.
        "split_special_tokens": True,
    }
    write_json(folder / CONFIG_NAME, record)


def _name_bos(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the BOS token's name, or none, into the files next to a tokenizer.json."""
    for name in (CONFIG_NAME, SPECIAL_TOKENS_MAP):
        if not (folder / name).is_file():
            continue
        record = json.loads((folder / name).read_bytes())
        record.pop("bos_token", None)
        settings = _bos_settings(tokenizer)
        if name == CONFIG_NAME:
            # Classes of their own would name another BOS token, and put it before texts.
            record |= {**settings, "tokenizer_class": FAST_CLASS}
        elif "bos_token" in settings:
            record["bos_token"] = settings["bos_token"]
        write_json(folder / name, record)


def _bos_settings(tokenizer: Tokenizer) -> JsonObject:
    if tokenizer.bos_id is None:
        return {"add_bos_token": False}
    text = tokenizer.token_text(tokenizer.bos_id)
    return {"bos_token": text, "add_bos_token": bool(tokenizer.document_prefix)}


def write_json(path: Path, record: JsonObject) -> None:
    """Write a file of JSON as transformers does."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def real_lines(documents: Iterable[str], count: int) -> Iterator[str]:
    """Return the first `count` different lines of some length, line breaks included."""
    lines = (line for text in documents for line in text.splitlines(keepends=True) if line.strip())
    return islice(iter(dict.fromkeys(lines)), count)
