"""Hugging Face tokenizers: nothing lost, bytes counted, no document forges its end, bad files refused."""

import inspect
import json
import textwrap
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_nexus.data.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_nexus.data.tokenizer import open_tokenizer
from megatron_nexus.errors import DataError

SOURCES = [inspect.getsource(module) for module in (json, json.decoder, textwrap)]
HARD_TEXTS = [
    "",
    " ",
    "\t\ttabs\r\n\n",
    "NUL\0 \U0001f600 e\u0301 \u00e9 \ufb01\u3000",
    "a<|endoftext|>b<tool>c",
]
END = "<|endoftext|>"


def train(folder: Path, special: list[str], **parts: object) -> Path:
    """A byte-level BPE of 600 tokens as Hugging Face saves it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SOURCES, trainer)
    made.add_tokens(["<tool>"])
    for name, part in parts.items():
        setattr(made, name, part)
    made.enable_truncation(16)
    made.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), [END])


@pytest.mark.parametrize("text", [*SOURCES, *HARD_TEXTS])
def test_nothing_is_lost_and_every_byte_is_counted(folder: Path, text: str) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.lossless
    assert tokenizer.eod_id not in ids
    assert max(ids, default=0) < tokenizer.vocab_size == len(tokenizer.bytes_per_token()) == 601
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


def test_threads_change_nothing(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder / "tokenizer.json")
    texts = [*SOURCES, *HARD_TEXTS]
    for threads in (1, 2):
        documents = tokenizer.encode_documents(texts, threads)
        assert [ids.tolist() for ids in documents] == [tokenizer.encode(text) for text in texts]


def test_a_normalizing_tokenizer_is_not_lossless(tmp_path: Path) -> None:
    assert not open_tokenizer(train(tmp_path, [END], normalizer=normalizers.NFC())).lossless


@pytest.mark.parametrize("end", ["[END]", {"content": "[END]", "lstrip": False}])
def test_the_end_of_a_document_stands_in_the_config(tmp_path: Path, end: object) -> None:
    folder = train(tmp_path, [END, "[END]"])
    plain = open_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    configured = open_tokenizer(folder)
    assert (plain.eod_id, configured.eod_id) == (0, 1)
    assert plain.fingerprint != configured.fingerprint


@pytest.mark.parametrize(
    ("special", "config", "message"),
    [
        (["[START]"], None, "none of the customary ones"),
        ([END, "</s>"], None, r"<\|endoftext\|>, </s>"),
        ([END], '{"eos_token": "<eos>"}', "use the two files of one tokenizer"),
        ([END], "{", "copy it again or remove it"),
    ],
)
def test_an_unknown_end_is_refused(
    tmp_path: Path, special: list[str], config: str | None, message: str
) -> None:
    folder = train(tmp_path, special)
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=message):
        open_tokenizer(folder)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"PK\3\4", b'{"model": {}}'])
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        open_tokenizer(tmp_path)


def test_lone_surrogates_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        open_tokenizer(folder).encode("before \ud83d after")
