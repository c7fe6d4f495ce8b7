"""What is known of a tokenized corpus beyond its `.bin` and `.idx`: the `.json` next to them.

Corpora of Megatron-LM have none; everything works without it, and with it a wrong tokenizer is refused. It
also says what the tokenizer did not keep: texts are compared with what their tokens decode to.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_nexus.base.json_text import parse_json, record_of
from megatron_nexus.data.indexed_dataset import IndexedDataset, json_path
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.errors import DataError

SAMPLED_DOCUMENTS = 64
BEFORE_CHARACTERS, AFTER_CHARACTERS = 20, 40
"""Of an example, around the first character that differs."""


@dataclasses.dataclass(frozen=True)
class CorpusDescription:
    """Where a corpus came from and what went in."""

    tokenizer: str
    """Name of the tokenizer's file."""
    tokenizer_fingerprint: str
    vocab_size: int
    """Size of the tokenizer's vocabulary: every id is below it."""
    eod_id: int
    append_eod: bool
    """Whether every document ends with `eod_id`."""
    json_key: str
    """Field of the JSON records, column of the parquet files."""
    txt_documents: str
    """What a document is in .txt files: "file" or "line"."""
    input_files: int
    input_bytes: int
    """Size of the input files on disk."""
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of all documents."""
    empty_documents: int
    """Records without text, left out."""
    malformed: dict[str, int]
    """Records left out because they cannot be read, by what is wrong with them."""
    malformed_samples: list[str]
    """The first of them, each with its file and line."""
    empty_files: int = 0
    """Files of 0 bytes, left out."""
    prepend_bos: bool = False
    """Whether every document begins with `bos_id`."""
    bos_id: int | None = None
    unknown_share: float | None = None
    """Share of the tokens that stand for what the vocabulary lacks; None: written before it was counted."""
    lossless: bool | None = None
    """Whether all documents come back from their tokens as they were; None: written before it was checked."""
    changed_documents: int = 0
    """Documents that do not."""
    changed_example: list[str] = dataclasses.field(default_factory=list)
    """Where the first of them changes: a piece of its text, and what comes back of it."""

    def to_json(self) -> str:
        """Return the contents of the file."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_description(prefix: Path) -> CorpusDescription | None:
    """Return the description of a corpus, None where it has none.

    Raises DataError: the file is damaged or of another version.
    """
    file = json_path(prefix)
    try:
        return record_of(CorpusDescription, parse_json(file.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} does not describe a corpus ({error}): remove it if it is not one of ours, or preprocess "
            "the corpus again"
        ) from None


def check_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that a corpus was not written with; a corpus without description passes.

    Raises DataError: the tokenizers differ, or the description is damaged.
    """
    description = read_description(prefix)
    if description is not None and description.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was written with the tokenizer {description.tokenizer} (sha256 "
            f"{description.tokenizer_fingerprint[:12]}), not with {tokenizer.model_path} "
            f"({tokenizer.fingerprint[:12]}): give that one with --tokenizer-model, or preprocess the text "
            "again with this one"
        )


def begins_with(dataset: IndexedDataset, token: int | None) -> bool:
    """Return whether documents begin with a token, by a few of them: corpora of others do not say."""
    step = max(1, dataset.document_count // SAMPLED_DOCUMENTS)
    starts = {dataset.document_start(document) for document in range(0, dataset.document_count, step)}
    return all(dataset.tokens(start, start + 1).tolist() == [token] for start in starts)


def first_change(text: str, decoded: str) -> list[str]:
    """Return where two texts begin to differ: a piece of each, of the same place."""
    shorter = min(len(text), len(decoded))
    differs = next((i for i in range(shorter) if text[i] != decoded[i]), shorter)
    piece = slice(max(0, differs - BEFORE_CHARACTERS), differs + AFTER_CHARACTERS)
    return [text[piece], decoded[piece]]


def loss_lines(description: CorpusDescription) -> list[str]:
    """Return what is lost in a corpus: lines to warn with, none where nothing is."""
    lines = []
    if description.changed_documents:
        lines.append(
            f"the tokenizer {description.tokenizer} loses text: {description.changed_documents:,} of "
            f"{description.documents + description.empty_documents:,} documents come back changed from their "
            f"tokens, such as {changed_text(description.changed_example)}"
        )
    if description.unknown_share:
        lines.append(
            f"{100 * description.unknown_share:.2g} % of the tokens are unknown ids, which the tokenizer "
            f"{description.tokenizer} gives to what its vocabulary lacks"
        )
    if lines:
        lines.append(
            "a model trained on this corpus never sees what is lost: use a tokenizer that keeps it, as those "
            "of train_tokenizer.py do, unless it is meant"
        )
    return lines


def changed_text(example: Sequence[str]) -> str:
    """Return an example in words: before and after."""
    before, after = example
    return f"{before!r} -> {after!r}"
