"""The tokenizer of an export: the files by which transformers gives the same ids as training did.

A SentencePiece model becomes a `tokenizer.json`, which is compared with it on real text before it is kept;
what has a `tokenizer.json` already is copied with the settings beside it.
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
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.sentencepiece_model import Kind, read_sentencepiece_model
from megatron_nexus.interchange.tokenizer_json import tokenizer_json

CONFIG_NAME = "tokenizer_config.json"
COMPANIONS = (CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
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
        DataError: it cannot be told in a tokenizer.json.
        OSError: a file cannot be written.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _convert(tokenizer, folder, max_positions)
    source = tokenizer.model_path
    shutil.copyfile(source, folder / JSON_NAME)
    for name in COMPANIONS:
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), folder / name)
    if not (folder / CONFIG_NAME).is_file():
        names = json.loads(source.read_bytes())["added_tokens"]
        end = next(token["content"] for token in names if token["id"] == tokenizer.eod_id)
        _write_config(folder, {"eos_token": end}, max_positions)
    return f"{source}, as it is"


def _convert(tokenizer: SentencePieceTokenizer, folder: Path, max_positions: int) -> str:
    model = read_sentencepiece_model(tokenizer.model_path)
    (folder / JSON_NAME).write_text(tokenizer_json(model), encoding="utf-8")
    unknown = next(piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN)
    tokens = {"eos_token": model.pieces[tokenizer.eod_id].text, "unk_token": unknown}
    _write_config(folder, tokens, max_positions)
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
    for name in (MODEL_NAME,) if made else (JSON_NAME, *COMPANIONS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _is_conversion(record: Path, model: Path) -> bool:
    """Whether a `tokenizer.json` is what `_convert` makes of a SentencePiece model, to the letter."""
    try:
        return record.read_bytes() == tokenizer_json(read_sentencepiece_model(model)).encode()
    except DataError:  # no such model, or none that could be converted
        return False


def _write_config(folder: Path, tokens: dict[str, str], max_positions: int) -> None:
    record = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "pad_token": tokens["eos_token"],
        "padding_side": "left",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # What a text spells is text: in training no text stood for a control token either.
        "split_special_tokens": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def real_lines(documents: Iterable[str], count: int) -> Iterator[str]:
    """The first `count` different lines of some length, line breaks included."""
    lines = (line for text in documents for line in text.splitlines(keepends=True) if line.strip())
    return islice(iter(dict.fromkeys(lines)), count)
