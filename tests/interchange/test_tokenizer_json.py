"""A SentencePiece BPE and the tokenizer.json made of it give the same ids; others are refused."""

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_nexus.data.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.sentencepiece_model import read_sentencepiece_model
from megatron_nexus.interchange.tokenizer_files import real_lines
from megatron_nexus.interchange.tokenizer_json import tokenizer_json

# Blanks everywhere, U+2581 itself, control pieces spelt out, ligatures, combining marks, NUL, long runs.
PROBES = ["", " ", "  a", "a   ", "▁", " ▁ a", "</s> <unk> <0x0A>", "ﬁ e\u0301 é", "\U0001f600\r\n\0\t"]
PROBES += ["\n" * 9 + "   x" + " " * 30 + "\n    y", "aaaaaaaaaaaaabababababab", "======----======"]
SETTINGS: dict[str, dict[str, object]] = {
    "llama": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    },
    "sentencepiece's own": {},
    "no blank before": {"add_dummy_prefix": False, "byte_fallback": True},
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for text, _ in zip(standard_library_documents(), range(200), strict=False)]


def train(documents: list[str], path: Path, **settings: object) -> Path:
    model = io.BytesIO()
    lines = real_lines(documents, 5000)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.strip("\n") for line in lines),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 800, "minloglevel": 2, "num_threads": 1, **settings},
    )
    path.write_bytes(model.getvalue())
    return path


def assert_same_ids(model: Path, documents: list[str]) -> None:
    made = model.with_name("tokenizer.json")
    made.write_text(tokenizer_json(read_sentencepiece_model(model)), encoding="utf-8")
    ours, theirs = SentencePieceTokenizer(model), HuggingFaceTokenizer(made)
    assert theirs.vocab_size == ours.vocab_size and theirs.eod_id == ours.eod_id
    lines = list(real_lines(documents, 20_000))
    assert len(lines) == 20_000
    for texts in (PROBES, lines, documents[:20]):
        for text, one, other in zip(
            texts, ours.encode_documents(texts, 1), theirs.encode_documents(texts, 1), strict=True
        ):
            assert one.tolist() == other.tolist(), repr(text[:200])
            if ours.lossless:
                assert theirs.decode(one.tolist()) == text


@pytest.mark.slow
def test_of_our_own_models(documents: list[str], tmp_path: Path) -> None:
    train_sentencepiece_bpe(documents, tmp_path / "spm.model", 1500)
    assert_same_ids(tmp_path / "spm.model", documents)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_of_models_with_other_settings(documents: list[str], tmp_path: Path, name: str) -> None:
    assert_same_ids(train(documents, tmp_path / "spm.model", **SETTINGS[name]), documents)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "unigram"}, "is of the kind unigram"),
        ({"user_defined_symbols": ["def"]}, "adds a blank before a text and has user-defined pieces"),
        ({"treat_whitespace_as_suffix": True}, "puts the blank at the end of words"),
    ],
)
def test_what_cannot_be_told_is_refused(
    documents: list[str], tmp_path: Path, settings: dict[str, object], expected: str
) -> None:
    model = read_sentencepiece_model(train(documents[:5], tmp_path / "spm.model", vocab_size=400, **settings))
    with pytest.raises(DataError, match=expected):
        tokenizer_json(model)


@pytest.mark.parametrize("contents", [b"", b"empty", b"\x0a\xff\xff", b"\x0a\x02\x0a\x00" * 3 + b"\x12"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "spm.model").write_bytes(contents)
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        read_sentencepiece_model(tmp_path / "spm.model")
