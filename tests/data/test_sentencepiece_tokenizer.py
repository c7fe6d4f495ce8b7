"""A trained tokenizer loses nothing, counts bytes exactly and is the same each time."""

import inspect
import json
import textwrap
from pathlib import Path
from random import Random

import pytest

from megatron_nexus.data.sentencepiece_tokenizer import BLANK, SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.errors import DataError

SOURCES = [inspect.getsource(module) for module in (json, json.decoder, textwrap)]
HARD_TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "\ttabs\t\tbetween\n\t\tand before\n",
    "line\r\nends\r\n\r\nof\rother\r\n systems",
    "\n" * 9 + " \n  \n",
    "NUL\0inside\0\0",
    "\ufeffbyte order mark \U0001f600 \U0001f469\u200d\U0001f680",
    "e\u0301 \u00e9 \ufb01 \u00bd \u3000\u00a0\x85\x0c\x1b",
    f"{BLANK}its own{BLANK}{BLANK} blank {BLANK}\n{BLANK * 3}x{BLANK}",
    "<unk></s><s><0x0A> \u2047 \u2585",
    "if x:\n    if y:\n        return 12345\n\n\n            x\n     y",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    model_path = tmp_path_factory.mktemp("tokenizer") / "trained.model"
    train_sentencepiece_bpe(SOURCES, model_path, vocab_size=1000)
    return SentencePieceTokenizer(model_path)


@pytest.mark.parametrize("text", [*SOURCES, *HARD_TEXTS])
def test_nothing_is_lost_and_every_byte_is_counted(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text


def test_threads_change_nothing(tokenizer: SentencePieceTokenizer) -> None:
    texts = [*SOURCES, *HARD_TEXTS]
    threaded = tokenizer.encode_documents(texts, threads=3)
    assert [ids.tolist() for ids in threaded] == [tokenizer.encode(text) for text in texts]


def test_the_vocabulary_is_as_asked(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == len(tokenizer.bytes_per_token()) == 1000
    assert 0 <= tokenizer.eod_id < 1000
    assert tokenizer.bytes_per_token()[tokenizer.eod_id] == 0
    assert tokenizer.lossless


def test_an_indent_and_its_line_break_are_one_token(tokenizer: SentencePieceTokenizer) -> None:
    assert len(tokenizer.encode("\n        return")) == len(tokenizer.encode(" return")) + 1


def test_training_is_silent_and_gives_the_same_file(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_sentencepiece_bpe(reversed(SOURCES), tmp_path / "again.model", vocab_size=1000)
    assert (tmp_path / "again.model").read_bytes() == tokenizer.model_path.read_bytes()
    assert SentencePieceTokenizer(tmp_path / "again.model").fingerprint == tokenizer.fingerprint
    assert capfd.readouterr() == ("", "")


def test_the_sample_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """Documents of very different sizes, so that a dropped one leaves room that a later one would fit."""
    random = Random(0)
    text, documents = "".join(SOURCES), []
    while text:
        size = random.choice([50, 500, 5000, 15_000])
        documents, text = [*documents, text[:size]], text[size:]
    for name in ("a", "b", "c", "d"):
        train_sentencepiece_bpe(documents, tmp_path / name, vocab_size=500, sample_bytes=30_000)
        random.shuffle(documents)
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (["hello"], 100, "is below the 275 pieces"),
        (["hello"], 9000, "too high"),
        ([], 500, "no text"),
        (["\n\n"], 500, "no text"),
        (["a\ud800"], 500, "lone surrogate"),
    ],
)
def test_training_that_cannot_work_is_refused(
    tmp_path: Path, documents: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece_bpe(documents, tmp_path / "x.model", vocab_size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 no model", b"\0" * 100])
def test_files_that_are_no_model_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.model"):
        SentencePieceTokenizer(tmp_path / "x.model")


def test_lone_surrogates_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("before \ud83d after")
