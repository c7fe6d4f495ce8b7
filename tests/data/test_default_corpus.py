"""The default corpus is prepared once, completely or not at all, whoever is killed and whoever races."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.default_corpus import DefaultCorpus, prepare_default_corpus
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.data.standard_library import source_documents
from megatron_nexus.errors import DataError

VOCAB_SIZE = 600
SCRIPT = f"""
import resource, sys
from functools import partial
from pathlib import Path
from megatron_nexus.data.default_corpus import prepare_default_corpus
from megatron_nexus.data.standard_library import source_documents
from megatron_nexus.errors import DataError
from megatron_nexus.log import configure

configure(is_main_rank=True)
cache, source, largest_file_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if largest_file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
try:
    corpus = prepare_default_corpus(cache, {VOCAB_SIZE}, partial(source_documents, source))
except DataError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library: four modules cut to pieces, and files that are to be left out."""
    root = tmp_path_factory.mktemp("library")
    text = "".join(inspect.getsource(module) for module in (json, json.decoder, textwrap))
    (root / "package").mkdir()
    for number, piece in enumerate(textwrap.wrap(text, 4000, replace_whitespace=False)):
        (root / "package" / f"piece{number}.py").write_text(piece)
    shutil.copy(root / "package" / "piece0.py", root / "copy.py")
    (root / "empty.py").touch()
    (root / "latin1.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    (root / "notes.txt").write_text("not a source file")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "installed.py").write_text("not of the standard library")
    return root


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DefaultCorpus]:
    cache = tmp_path_factory.mktemp("cache")
    yield prepare_default_corpus(cache / "made" / "here", VOCAB_SIZE, partial(source_documents, source))


def start(cache: Path, source: Path, largest_file_bytes: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, cache, source, str(largest_file_bytes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def contents(corpus: DefaultCorpus) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corpus.prefix.parent.iterdir()}


def test_the_corpus_holds_every_document_once(source: Path, prepared: DefaultCorpus) -> None:
    tokenizer = SentencePieceTokenizer(prepared.tokenizer_path)
    dataset = IndexedDataset(prepared.prefix)
    ends = np.cumsum(dataset.document_lengths).tolist()
    documents = [dataset.tokens(a, b).tolist() for a, b in zip([0, *ends], ends, strict=False)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    texts = [tokenizer.decode(document) for document in documents]
    expected = {path.read_text() for path in (source / "package").iterdir()}
    assert sorted(texts) == sorted(expected)
    assert texts != sorted(texts), "the documents are not shuffled"
    assert prepared.documents == len(texts) == dataset.document_count
    assert prepared.tokens == dataset.token_count
    counted = tokenizer.bytes_per_token()[dataset.tokens(0, dataset.token_count)].sum()
    assert prepared.bytes == counted == sum(len(text.encode()) for text in texts)


def test_a_prepared_corpus_is_used_as_it_is(source: Path, prepared: DefaultCorpus) -> None:
    cache = prepared.prefix.parents[1]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert prepare_default_corpus(cache, VOCAB_SIZE, partial(source_documents, source)) == prepared
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_other_documents_and_vocabularies_are_other_corpora(tmp_path: Path, source: Path) -> None:
    texts = list(source_documents(source))
    corpora = [
        prepare_default_corpus(tmp_path, vocab_size, lambda chosen=chosen: chosen)
        for vocab_size, chosen in [(600, texts), (601, texts), (600, texts[:-2]), (600, texts[::-1])]
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 3
    assert corpora[0] == corpora[3], "the order of the documents is our own"


@pytest.mark.parametrize("name", ["corpus.bin", "manifest.json", "tokenizer.model"])
def test_a_damaged_corpus_is_prepared_again(
    tmp_path: Path, source: Path, prepared: DefaultCorpus, name: str
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(prepared.prefix.parents[1], cache)
    file = cache / prepared.prefix.parent.name / name
    file.write_bytes(file.read_bytes()[:-3])
    again = prepare_default_corpus(cache, VOCAB_SIZE, partial(source_documents, source))
    assert contents(again) == contents(prepared)


@pytest.mark.law  # by default: of racing processes one prepares, and a full disk
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3])
def test_a_kill_leaves_nothing_that_passes_for_complete(
    tmp_path: Path, source: Path, prepared: DefaultCorpus, delay_s: float
) -> None:
    with start(tmp_path, source) as process:
        while not list(tmp_path.glob(".tmp_*")):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
    for folder in tmp_path.glob("python-stdlib-*"):
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == contents(prepared)
    again = prepare_default_corpus(tmp_path, VOCAB_SIZE, partial(source_documents, source))
    assert contents(again) == contents(prepared)
    assert not list(tmp_path.glob(".tmp_*"))


def test_of_racing_processes_one_prepares(tmp_path: Path, source: Path, prepared: DefaultCorpus) -> None:
    processes = [start(tmp_path, source) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("Training a tokenizer" in output for output in outputs) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"python-stdlib.lock", prepared.prefix.parent.name}
    made = tmp_path / prepared.prefix.parent.name
    assert {f.name: f.read_bytes() for f in made.iterdir()} == contents(prepared)


def test_a_full_disk_names_the_remedy_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with start(tmp_path, source, largest_file_bytes=10_000) as process:
        errors = process.communicate()[1]
    assert process.returncode == 1
    assert "--data-cache-path" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["python-stdlib.lock"]


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--data-cache-path"):
        prepare_default_corpus(tmp_path / "file" / "cache", VOCAB_SIZE, partial(source_documents, source))


def test_another_tokenizer_makes_another_corpus_of_the_same_documents(source: Path, tmp_path: Path) -> None:
    collect = partial(source_documents, source)
    own = prepare_default_corpus(tmp_path, VOCAB_SIZE, collect)
    larger = prepare_default_corpus(tmp_path / "elsewhere", VOCAB_SIZE + 100, collect)
    tokenizer = SentencePieceTokenizer(larger.tokenizer_path)
    given = prepare_default_corpus(tmp_path, VOCAB_SIZE, collect, tokenizer)
    assert given.fingerprint not in (own.fingerprint, larger.fingerprint)
    assert given.tokenizer_path == larger.tokenizer_path
    assert given == prepare_default_corpus(tmp_path, VOCAB_SIZE, collect, tokenizer), "from the cache"
    assert (given.documents, given.bytes, given.tokens) == (larger.documents, larger.bytes, larger.tokens)
    contents = [corpus.prefix.with_suffix(".bin").read_bytes() for corpus in (given, larger)]
    assert contents[0] == contents[1]
