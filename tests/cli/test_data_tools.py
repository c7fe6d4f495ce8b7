"""The data tools as users run them: train a tokenizer, preprocess, inspect; and what they say of mistakes."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.cli.main import main
from megatron_nexus.data.corpus_description import CorpusDescription
from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_nexus.data.inspection import Bin, find_problems, length_histogram, sample_documents
from tests.support.paths import REPOSITORY
from tests.support.waiting import TIMEOUT_S

WORDS = ["one two three", "four five", "six seven eight nine ten eleven"] * 50


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def call(
    verb: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a verb that is called in this process."""
    monkeypatch.setattr(sys, "argv", ["nexus", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main(verb)
    captured = console.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


@pytest.mark.slow
def test_from_text_to_a_corpus_that_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "in.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS) + "oops\n")
    model, prefix = tmp_path / "spm.model", tmp_path / "out" / "corpus"
    trained = run_tool("train_tokenizer", "--input", records, "--vocab-size", 300, "--output", model)
    assert trained.returncode == 0, trained.stderr
    assert "300 pieces" in trained.stdout
    assert "1 malformed record left out: 1 not JSON" in trained.stdout
    made = run_tool(
        "preprocess_data", "--input", records, "--output-prefix", prefix, "--tokenizer-model", model
    )
    assert made.returncode == 0, made.stderr
    assert f"{records}:151: not JSON: 'oops'" in made.stdout
    shown = run_tool("inspect_data", prefix, "--tokenizer-model", model, "--samples", 2)
    assert shown.returncode == 0, shown.stderr
    assert "documents        150" in shown.stdout
    assert "document 37 begins 'four five'" in shown.stdout
    assert "No problem found" in shown.stdout
    again = run_tool(
        "preprocess_data", "--input", records, "--output-prefix", prefix, "--tokenizer-model", model
    )
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    # Workers take nothing of the working directory for what is installed.
    (tmp_path / "sentencepiece.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    elsewhere = run_tool(
        "preprocess_data", "--input", records, "--output-prefix", "elsewhere", "--tokenizer-model", model
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert Path("elsewhere.bin").read_bytes() == prefix.with_name("corpus.bin").read_bytes()


def test_the_histogram_counts_every_document_once() -> None:
    lengths = np.array([0, 1, 2, 3, 4, 7, 8, 1 << 40], dtype=np.int64)
    bins = length_histogram(lengths)
    assert bins[:5] == [Bin(0, 0, 1), Bin(1, 1, 1), Bin(2, 3, 2), Bin(4, 7, 2), Bin(8, 15, 1)]
    assert sum(entry.documents for entry in bins) == len(lengths)
    assert bins[-1].smallest == 1 << 40
    assert length_histogram(np.array([5, 6]))[0] == Bin(4, 7, 2)


def test_inspecting_takes_little_more_than_the_lengths_of_the_documents(tmp_path: Path) -> None:
    documents = 1 << 22
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.zeros(documents, dtype=np.int64), [1] * documents)
    dataset = IndexedDataset(tmp_path / "a")
    known = CorpusDescription(
        "t", "f", 7, 0, True, "text", "file", 1, 1, documents, documents, documents, 0, {}, []
    )
    tracemalloc.start()
    assert find_problems(dataset, known, None) == []
    assert length_histogram(dataset.document_lengths) == [Bin(1, 1, documents)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 8 bytes a document, and those of a block of a million in several arrays.
    assert peak < 18 * documents


def test_samples_are_spread_over_the_corpus(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_documents(np.arange(10), [1] * 10)
    dataset = IndexedDataset(tmp_path / "c")
    assert sample_documents(dataset, 0) == []
    assert sample_documents(dataset, 2) == [2, 7]
    assert sample_documents(dataset, 50) == [*range(10)]


@pytest.mark.parametrize(
    ("ids", "description", "message"),
    [
        ([5, 1, 300, 1], {}, "1 ids are not below the vocabulary size 300"),
        ([5, 1, 5, 5], {}, "1 documents do not end with the end token 1"),
        ([5, 1, 5, 1], {"documents": 3}, "promises 3 documents, the index has 2"),
        ([5, 1, 5, 1], {"tokens": 3}, "promises 3 tokens, the index has 4"),
        ([5, 1, 5, 1], {"tokenizer_fingerprint": "x"}, "was written with another tokenizer (t.model)"),
        ([5, 1, 5, 1], None, ""),
        ([5, 1, 5, 1], {}, ""),
        ([5, 1, 5, 5], {"append_eod": False}, ""),
    ],
)
def test_inspection_finds_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
    ids: list[int],
    description: dict[str, object] | None,
    message: str,
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(WORDS))
    model = tmp_path / "spm.model"
    code, out, err = call(
        "train-tokenizer",
        monkeypatch,
        console,
        *("--input", tmp_path / "in.txt", "--vocab-size", 300, "--output", model),
    )
    assert (code, err) == (0, ""), out
    fingerprint = out.split("sha256 ")[1].strip()
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_documents(np.array(ids), [2, 2])
        if description is not None:
            known = {
                "tokenizer": "t.model",
                "tokenizer_fingerprint": fingerprint,
                "vocab_size": 300,
                "eod_id": 1,
                "append_eod": True,
                "json_key": "text",
                "txt_documents": "file",
                "input_files": 1,
                "input_bytes": 1,
                "documents": 2,
                "tokens": 4,
                "text_bytes": 9,
                "empty_documents": 0,
                "malformed": {},
                "malformed_samples": [],
            }
            writer.description = json.dumps(known | description)
    code, out, err = call(
        "inspect-data", monkeypatch, console, tmp_path / "corpus", "--tokenizer-model", model
    )
    assert "documents        2" in out
    assert code == (2 if message else 0), err
    assert message in err
    assert ("No problem found" in out) == (not message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "spm.model", "--input", "missing.txt"], "missing.txt stands for no file"),
        (["--output", "in.txt", "--input", "in.txt"], "--output in.txt exists"),
        (["--output", "in.txt/spm.model", "--input", "in.txt"], "cannot be written"),
        (
            ["--output", "spm.model", "--input", "in.txt", "--vocab-size", "9000"],
            "choose another --vocab-size",
        ),
        (
            ["--output", "new/er/spm.model", "--input", "in.txt", "--vocab-size", "260"],
            "is below the 277 pieces that the characters of this corpus need: give at least 277",
        ),
        (["--output", "/proc/x/spm.model", "--input", "in.txt"], "cannot be written"),
        (["--output", ".", "--input", "in.txt"], ". is a folder: add a name, such as spm.model"),
        (["--output", "new/spm.model", "--input", "latin.txt"], "1 malformed record left out: 1 not UTF-8"),
        (["--output", "spm.model", "--input", "in.jsonl"], "write one JSON object a line"),
        (["--output", "spm.model", "--input", "in.jsonl", "--strict"], "in.jsonl:1: not JSON"),
        (
            ["--output", "spm.model", "--input", "in.txt", "--vocab-size", "0"],
            "0 must be a finite number above 0",
        ),
    ],
)
def test_training_a_tokenizer_that_cannot_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("one two")
    (tmp_path / "in.jsonl").write_text("oops\n")
    (tmp_path / "latin.txt").write_bytes("ein schöner Text".encode("latin-1"))
    code, _, err = call("train-tokenizer", monkeypatch, console, *flags)
    assert code == 2
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.txt", "latin.txt"]
