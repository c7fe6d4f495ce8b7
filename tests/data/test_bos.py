"""BOS: what a tokenizer's files say of it, corpora with and without it; and text that tokenizers lose."""

import dataclasses
import inspect
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as HuggingFace
from tokenizers import processors

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.config.command_line import build
from megatron_nexus.config.data_path import Source
from megatron_nexus.data.corpus_description import CorpusDescription, begins_with, read_description
from megatron_nexus.data.default_corpus import prepare_default_corpus
from megatron_nexus.data.documents import RecordFormat
from megatron_nexus.data.indexed_dataset import IndexedDataset, json_path
from megatron_nexus.data.inspection import find_problems
from megatron_nexus.data.preprocess import PreprocessConfig, preprocess, work_folder
from megatron_nexus.data.run_data import RunData
from megatron_nexus.data.shards import TokenizeConfig
from megatron_nexus.data.tokenizer import encode_prompt, open_tokenizer
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.post_processor import beginning_with
from tests.data.test_huggingface_tokenizer import END, train

TEXTS = ["def f(x):\n    if x:\n        return  1\n", "The quick brown fox jumps over the lazy dog.\n" * 9]
BOS = "<s>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json that puts BOS before texts, with its settings next to it; and texts."""
    folder = tmp_path_factory.mktemp("bos")
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    train(folder / "tokenizer", [END, BOS], post_processor=template)
    settings = {"eos_token": END, "bos_token": BOS}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SentencePiece's own trainer makes one: it normalizes, strips, and has a BOS piece."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(json.decoder).split("\n")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def write(folder: Path, tokenizer: Path, name: str, prepend_bos: bool | None = None) -> Path:
    job = PreprocessConfig(
        [str(folder / "texts.jsonl")],
        folder / name,
        TokenizeConfig(
            work_folder(folder / name), tokenizer, RecordFormat("text", "file"), True, False, prepend_bos
        ),
        workers=1,
        overwrite=True,
    )
    preprocess(job, SingleProcess())
    return folder / name


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    starts = [dataset.document_start(d) for d in range(dataset.document_count + 1)]
    return [dataset.tokens(a, b).tolist() for a, b in pairwise(starts)]


def test_a_corpus_begins_its_documents_as_the_tokenizer_does_unless_told(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.document_prefix, tokenizer.eod_id) == (1, (1,), 0)
    assert encode_prompt(tokenizer, "") == [1]
    plain = [[*tokenizer.encode(text), 0] for text in TEXTS]
    of_itself = write(folder, folder / "tokenizer", "of-itself")
    without = write(folder, folder / "tokenizer", "without", prepend_bos=False)
    assert documents(of_itself) == [[1, *ids] for ids in plain]
    assert documents(without) == plain
    for prefix, begins in ((of_itself, True), (without, False)):
        description = read_description(prefix)
        assert description is not None and description.prepend_bos is begins
        assert begins_with(IndexedDataset(prefix), 1) is begins
        assert find_problems(IndexedDataset(prefix), description, tokenizer) == []
        assert (description.lossless, description.unknown_share) == (True, 0.0)
    description = dataclasses.replace(read_description(without), prepend_bos=True, bos_id=1)
    assert "2 documents do not begin" in "".join(
        find_problems(IndexedDataset(without), description, tokenizer)
    )


def test_a_run_reads_the_decision_off_its_corpora_which_must_agree(folder: Path) -> None:
    names = [folder / "of-itself", folder / "without"]
    write(folder, folder / "tokenizer", "of-itself")
    write(folder, folder / "tokenizer", "without", prepend_bos=False)
    config = build({"vocab_size": 700, "seq_length": 8, "data_path": ("x",), "split": "1,1"})
    sources = [Source(name, None) for name in names]
    for source, begins in zip(sources, (True, False), strict=True):
        assert RunData(config, [source], folder / "tokenizer").prepend_bos is begins
        assert RunData(config, [source], None).prepend_bos is begins
    with pytest.raises(
        DataError, match=r"of-itself begin with BOS, those of .*without do not.*preprocess one"
    ):
        RunData(config, sources, folder / "tokenizer")
    # Corpora of others have no description: their tokens tell.
    for name in names:
        json_path(name).unlink()
    for source, begins in zip(sources, (True, False), strict=True):
        assert RunData(config, [source], folder / "tokenizer").prepend_bos is begins
        assert RunData(config, [source], None).prepend_bos is None


def test_descriptions_of_earlier_corpora_mean_no_bos(folder: Path, tmp_path: Path) -> None:
    prefix = write(folder, folder / "tokenizer", "of-itself")
    record = json.loads(json_path(prefix).read_text())
    added = {field.name for field in dataclasses.fields(CorpusDescription)[-6:]}
    assert "prepend_bos" in added
    json_path(tmp_path / "old").write_text(json.dumps({k: v for k, v in record.items() if k not in added}))
    old = read_description(tmp_path / "old")
    assert old is not None and not old.prepend_bos and old.lossless is None and old.unknown_share is None


def test_a_sentencepiece_model_begins_documents_where_it_is_told(
    sentencepiece_model: Path, folder: Path
) -> None:
    tokenizer = open_tokenizer(sentencepiece_model)
    assert (tokenizer.bos_id, tokenizer.document_prefix) == (1, ())
    corpora = [
        write(folder, sentencepiece_model, f"spm-{prepend}", prepend_bos=prepend) for prepend in (None, True)
    ]
    without, having = map(documents, corpora)
    assert having == [[1, *ids] for ids in without]
    config = sentencepiece_model.with_name("tokenizer_config.json")
    try:
        config.write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}))
        assert open_tokenizer(sentencepiece_model).document_prefix == (1,)
        assert open_tokenizer(sentencepiece_model).fingerprint == tokenizer.fingerprint
        config.write_text(json.dumps({"eos_token": "</s>"}))
        with pytest.raises(DataError, match="names no such token"):
            open_tokenizer(sentencepiece_model, prepend_bos=True)
    finally:
        config.unlink()


def test_what_a_tokenizer_loses_is_told_and_kept(
    sentencepiece_model: Path, folder: Path, console: pytest.CaptureFixture[str]
) -> None:
    from megatron_nexus.log import configure

    configure(is_main_rank=True)
    description = read_description(write(folder, sentencepiece_model, "lossy"))
    output = console.readouterr().out
    assert "loses text: 2 of 2 documents" in output and output.count("loses text") == 1
    assert "'def f(x):\\n    if x:\\n        return  1\\n' -> 'def f(x): if x: return 1'" in output
    assert description is not None and description.lossless is False
    assert description.unknown_share is not None and 0 <= description.unknown_share < 1
    write(folder, folder / "tokenizer", "kept")
    assert "loses text" not in console.readouterr().out


def test_a_vocabulary_that_lacks_bytes_is_not_lossless(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = record["model"]["vocab"]
    byte = next(token for token in vocabulary if token == "Õ")  # of Armenian letters: in no probe but one
    record["model"]["vocab"] = {("never" if token == byte else token): i for token, i in vocabulary.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert open_tokenizer(folder / "tokenizer").lossless
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    assert not open_tokenizer(tmp_path).lossless


def test_the_built_in_corpus_begins_documents_as_its_tokenizer_does(folder: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer")
    collect = partial(iter, TEXTS)
    having = prepare_default_corpus(tmp_path, 600, collect, tokenizer)
    without = prepare_default_corpus(tmp_path, 600, collect, tokenizer.with_bos(False))
    assert (having.prepend_bos, without.prepend_bos) == (True, False)
    assert documents(having.prefix) == [[1, *ids] for ids in documents(without.prefix)]
    assert having.tokens == without.tokens + len(TEXTS)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, ([], [])),
        (processors.ByteLevel(), ([], [])),
        (processors.TemplateProcessing("<s> $A [END]", special_tokens=[(BOS, 1), ("[END]", 2)]), ([], [2])),
        (
            processors.Sequence(
                [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=[(BOS, 1)])]
            ),
            ([], []),
        ),
        (processors.BertProcessing(("[END]", 2), (BOS, 1)), ([], [2])),
    ],
)
def test_a_post_processor_changes_what_stands_before_a_text_alone(
    tmp_path: Path, processor: object, expected: tuple[list[int], list[int]]
) -> None:
    made = train(tmp_path, [END, BOS, "[END]"], post_processor=processor) / "tokenizer.json"
    record = json.loads(made.read_text())
    _, after = expected
    plain = HuggingFace.from_file(str(made)).encode("a", add_special_tokens=False).ids[:1]
    for prefix in ([], [(BOS, 1)]):
        changed = record | {"post_processor": beginning_with(record["post_processor"], prefix)}
        changed |= {"truncation": None, "padding": None}
        tokenizer = HuggingFace.from_str(json.dumps(changed))
        begin = [token for _, token in prefix]
        assert tokenizer.encode("a").ids == [*begin, *plain, *after]
        assert tokenizer.encode("a", "a").ids == [*begin, *plain, *after] * 2
