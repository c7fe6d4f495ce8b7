"""A corpus is the same bytes however it is made: by any workers and ranks, after any kill, by Megatron-LM."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.base.durable import atomic_dir
from megatron_nexus.data.corpus_description import CorpusDescription, check_tokenizer, read_description
from megatron_nexus.data.documents import RecordFormat, split_into_slices
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.input_files import find_input_files
from megatron_nexus.data.preprocess import PreprocessConfig, preprocess, work_folder
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.shards import PREFIX, TokenizeConfig, make_shards, shard_prefix, tokenize_shard
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.log import logger
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.waiting import TIMEOUT_S, wait_for

ENDINGS = (".bin", ".idx", ".json")
# The real command, with shards so small that a test has many of them.
COMMAND = [
    sys.executable,
    "-c",
    "from megatron_nexus.cli.main import main; from megatron_nexus.data import preprocess\n"
    "preprocess.SMALLEST_SHARD_BYTES = 1 << 14\n"
    "if __name__ == '__main__': main('preprocess')",
]
MPIRUN = [shutil.which("mpirun") or "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    texts: list[str] = []
    for text in standard_library_documents():
        texts.append(text)
        if sum(map(len, texts)) > 3_000_000:
            break
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A tokenizer and inputs of every kind, among them records that are empty or malformed."""
    folder = tmp_path_factory.mktemp("corpus")
    train_sentencepiece_bpe(texts, folder / "spm.model", 1000, sample_bytes=500_000)
    inputs = folder / "inputs"
    inputs.mkdir()
    quarter = len(texts) // 4
    (inputs / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[: 2 * quarter])
    )
    with (inputs / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": 5}\n{oops\n')
    pq.write_table(
        pa.table({"text": texts[2 * quarter : 3 * quarter]}), inputs / "b.parquet", row_group_size=5
    )
    for number, text in enumerate(texts[3 * quarter :]):
        (inputs / f"c{number:03d}.txt").write_text(text)
    return folder


def job(folder: Path, output: Path, **options: object) -> PreprocessConfig:
    reading = RecordFormat("text", "file")
    tokenizing = TokenizeConfig(work_folder(output), folder / "spm.model", reading, True, False)
    for field in dataclasses.fields(TokenizeConfig):
        if field.name in options:
            tokenizing = dataclasses.replace(tokenizing, **{field.name: options.pop(field.name)})
    options = {"inputs": [str(folder / "inputs")], "workers": 1, **options}
    return PreprocessConfig(output_prefix=output, tokenizing=tokenizing, **options)  # type: ignore[arg-type]


def run_job(folder: Path, output: Path, **options: object) -> CorpusDescription | None:
    return preprocess(job(folder, output, **options), SingleProcess())


def contents(prefix: Path) -> list[bytes]:
    assert not prefix.with_name(f"{prefix.name}.shards").exists()
    return [prefix.with_name(prefix.name + ending).read_bytes() for ending in ENDINGS]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """The corpus, made by one worker in one shard."""
    prefix = folder / "reference"
    assert run_job(folder, prefix) == read_description(prefix)
    return prefix


def test_the_corpus_is_the_documents_in_order(folder: Path, reference: Path, texts: list[str]) -> None:
    tokenizer = SentencePieceTokenizer(folder / "spm.model")
    dataset = IndexedDataset(reference)
    assert dataset.document_count == len(texts)
    for document in range(dataset.document_count):
        ids = dataset.tokens(dataset.document_start(document), dataset.document_start(document + 1))
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.decode(ids[:-1].tolist()) == texts[document]
    description = read_description(reference)
    assert description is not None
    assert (description.documents, description.tokens) == (len(texts), dataset.token_count)
    assert description.text_bytes == sum(len(text.encode()) for text in texts)
    assert description.empty_documents == 1
    assert description.malformed == {"'text' is not a string": 1, "not JSON": 1}
    line = len(texts) // 4 * 2 + 2
    assert [sample.split(": ")[0] for sample in description.malformed_samples] == [
        f"{folder / 'inputs' / 'a.jsonl'}:{line}",
        f"{folder / 'inputs' / 'a.jsonl'}:{line + 1}",
    ]


def run(command: list[str], folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--input", str(folder / "inputs"), "--tokenizer-model", str(folder / "spm.model")]
    arguments += ["--output-prefix", str(output), *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize("launcher", [[], MPIRUN], ids=["one process", "mpirun"])
@pytest.mark.slow
def test_workers_ranks_and_shards_change_nothing(
    folder: Path, reference: Path, tmp_path: Path, launcher: list[str]
) -> None:
    done = run([*launcher, *COMMAND], folder, tmp_path / "corpus", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 if launcher else 1} ranks, 2 workers" in done.stdout
    assert contents(tmp_path / "corpus") == contents(reference)
    assert "2 malformed records left out: 1 'text' is not a string, 1 not JSON" in done.stdout
    assert list(tmp_path.glob("*.shards")) == []


@pytest.mark.slow
def test_under_mpirun_one_rank_says_what_is_wrong_and_all_end(folder: Path, tmp_path: Path) -> None:
    done = run([*MPIRUN, *COMMAND], folder, tmp_path / "corpus", "--workers", "1", "--strict")
    assert done.returncode == 2
    assert done.stderr.count("a.jsonl:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus.idx").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    folder: Path, reference: Path, tmp_path: Path, spawn: Spawn
) -> None:
    prefix, shards = tmp_path / "corpus", tmp_path / "corpus.shards"
    arguments = ["--input", str(folder / "inputs"), "--tokenizer-model", str(folder / "spm.model")]
    program = spawn([*COMMAND, *arguments, "--output-prefix", str(prefix), "--workers", "2"], tmp_path)
    wait_for(lambda: len(list(shards.glob("[!.]*/*.idx"))) >= 5, "five shards")
    os.kill(program.process.pid, signal.SIGKILL)
    program.end()
    wait_for(lambda: not program.left(), "the workers end with their parent")
    assert not prefix.with_name("corpus.idx").exists(), "killed too late"
    kept = sorted(shards.glob("[!.]*/*.idx"))
    # What a disk may lose: one shard is cut off, one has lost its description, and a partial file is left.
    cut = kept[0].with_suffix(".bin")
    cut.write_bytes(cut.read_bytes()[:-2])
    kept[1].with_suffix(".json").unlink()
    (shards / ".tmp_torn").mkdir()
    (shards / ".tmp_torn" / "tokens.bin").write_bytes(b"x")
    (shards / "old.bin").write_bytes(b"x")
    assert (tmp_path / ".tmp_corpus.bin").exists(), "what was merged until then"
    done = run(COMMAND, folder, prefix)
    assert f", {len(kept) - 2:,} of them finished by an earlier run" in done.stdout
    assert not shards.exists() and not list(tmp_path.glob(".tmp_*"))
    assert contents(prefix) == contents(reference)


def test_a_shard_is_named_after_all_that_decides_its_contents(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "some words"}\n' * 100)
    train_sentencepiece_bpe(["other words"], tmp_path / "other.model", 290)
    reading = RecordFormat("text", "file")
    tokenizing = TokenizeConfig(tmp_path, folder / "spm.model", reading, append_eod=True, strict=False)

    def name(slice_bytes: int = 1 << 20, model: Path = folder / "spm.model", **changes: object) -> Path:
        shard = make_shards(split_into_slices(find_input_files([str(file)]), reading, slice_bytes), 1 << 20)[
            0
        ]
        made = dataclasses.replace(tokenizing, **changes)  # type: ignore[arg-type]
        return shard_prefix(shard, made, SentencePieceTokenizer(model))

    assert name() == name(strict=True)
    names = [
        name(),
        name(append_eod=False),
        name(reading=RecordFormat("body", "file")),
        name(reading=RecordFormat("text", "line")),
        name(slice_bytes=100),
        name(model=tmp_path / "other.model"),
    ]
    os.utime(file, ns=(0, 0))
    names.append(name())
    file.write_text(file.read_text() + "\n")
    os.utime(file, ns=(0, 0))
    names.append(name())
    assert len(set(names)) == len(names) == 8


@pytest.mark.slow
def test_strict_finds_the_line_in_a_shard_that_is_finished(folder: Path, tmp_path: Path) -> None:
    """A run without --strict, killed before it merged, has passed over the record."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "some words"}\n{oops\n')
    shard = make_shards(
        split_into_slices(find_input_files([str(file)]), RecordFormat("text", "file"), 100), 100
    )[0]
    (tmp_path / "corpus.shards").mkdir()
    tokenizing = TokenizeConfig(
        tmp_path / "corpus.shards", folder / "spm.model", RecordFormat("text", "file"), True, False
    )
    tokenizer = SentencePieceTokenizer(folder / "spm.model")
    with atomic_dir(shard_prefix(shard, tokenizing, tokenizer).parent) as draft:
        tokenize_shard(shard, tokenizing, tokenizer, draft / PREFIX)
    wanted = job(folder, tmp_path / "corpus", inputs=[str(file)], strict=True)
    with pytest.raises(DataError, match=r"in\.jsonl:2: not JSON: '{oops': fix or remove"):
        preprocess(wanted, SingleProcess())
    made = run_job(folder, tmp_path / "corpus", inputs=[str(file)])
    assert made is not None
    assert (made.documents, made.malformed) == (1, {"not JSON": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_megatron_writes_the_same_bytes_and_reads_ours(folder: Path, reference: Path, tmp_path: Path) -> None:
    from megatron.core.datasets import indexed_dataset as megatron

    ours = IndexedDataset(reference)
    theirs = megatron.IndexedDataset(str(reference))
    assert len(theirs) == ours.document_count
    assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
    for vocab_size, dtype in ((65_499, np.uint16), (65_500, np.int32)):
        assert megatron.DType.optimal_dtype(vocab_size) == dtype
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=ours.dtype.type)
    tokenizer = SentencePieceTokenizer(folder / "spm.model")
    for document in range(ours.document_count):
        ids = ours.tokens(ours.document_start(document), ours.document_start(document + 1))
        assert (theirs[document] == ids).all()
        text = tokenizer.decode(ids.tolist())
        encoded = [*tokenizer.encode(text), tokenizer.eod_id]
        builder.add_document(encoded, [len(encoded)])
    builder.finalize(str(tmp_path / "corpus.idx"))
    for ending in (".bin", ".idx"):
        made = (tmp_path / f"corpus{ending}").read_bytes()
        assert made == reference.with_name(reference.name + ending).read_bytes()
    read_back = IndexedDataset(tmp_path / "corpus")
    assert (read_back.document_lengths == ours.document_lengths).all()


def test_one_tokenizer_belongs_to_a_corpus(folder: Path, reference: Path, tmp_path: Path) -> None:
    check_tokenizer(reference, SentencePieceTokenizer(folder / "spm.model"))
    train_sentencepiece_bpe(["other words"], tmp_path / "other.model", 290)
    with pytest.raises(DataError, match=r"was written with the tokenizer spm\.model"):
        check_tokenizer(reference, SentencePieceTokenizer(tmp_path / "other.model"))
    damaged = tmp_path / "damaged.json"
    for content in ("{", "[]", '{"tokens": 5}'):
        damaged.write_text(content)
        with pytest.raises(DataError, match="does not describe a corpus"):
            read_description(tmp_path / "damaged")
    assert read_description(tmp_path / "foreign") is None


def test_all_that_cannot_work_is_said_at_once(folder: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_job(folder, reference, inputs=["missing"], tokenizer_path=tmp_path / "no.model")
    said = caught.value.problems
    assert len(said) == 3
    assert "missing stands for no file" in said[0]
    assert "reference.bin" in said[1]
    assert "--overwrite" in said[1]
    assert "no.model cannot be read" in said[2]


def test_outputs_that_cannot_be_written_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out\.bin: give it without the ending: .*out$"):
        run_job(folder, tmp_path / "out.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/corpus\.shards cannot be written"):
        run_job(folder, tmp_path / "file" / "corpus")


def test_an_empty_file_among_others_is_left_out_counted_and_shown(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, prefix = tmp_path / "inputs", tmp_path / "corpus"
    inputs.mkdir()
    files = {"a.txt": "one", "b.txt": "", "c.parquet": "", "d.jsonl.gz": "", "e.txt": "two"}
    for name, text in files.items():
        (inputs / name).write_text(text)
    monkeypatch.setattr(logger, "propagate", True)
    made = run_job(folder, prefix, inputs=[str(inputs)])
    assert made is not None and (made.documents, made.empty_files, made.input_files) == (2, 3, 5)
    names = ", ".join(str(inputs / name) for name in ("b.txt", "c.parquet", "d.jsonl.gz"))
    assert f"3 files are empty and left out: {names}" in caplog.text
    with pytest.raises(ConfigError) as caught:
        run_job(folder, tmp_path / "strict", inputs=[str(inputs)], strict=True)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"--input {name} is empty" for name in names.split(", ")
    ]
    # The description of a corpus that was made before files were counted.
    facts = json.loads((tmp_path / "corpus.json").read_text())
    del facts["empty_files"]
    (tmp_path / "corpus.json").write_text(json.dumps(facts))
    assert read_description(prefix) == dataclasses.replace(made, empty_files=0)


def test_inputs_that_are_all_empty_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"hold no document:(\n.*)*1 file is empty and left out: .*a\.txt"):
        run_job(folder, tmp_path / "corpus", inputs=[str(tmp_path / "a.txt")])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "in.jsonl",
            b'\n{"body": "a"}\n{"text": ""}\n',
            ["\n  2 records without text\n  1 malformed record ", "say where the text is with --json-keys"],
        ),
        ("in.txt", b"sch\xf6n", ["1 not UTF-8", "convert the inputs to UTF-8"]),
        ("in.json", b'[\n {\n  "text": "a"\n }\n]\n', ["5 not JSON", "jq -c '.[]'"]),
        ("in.json", b'[{"text": "a"}]', ["1 no JSON object", "jq -c '.[]'"]),
    ],
)
def test_inputs_without_documents_are_refused(
    folder: Path, tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="hold no document:") as caught:
        run_job(folder, tmp_path / "new" / "corpus", inputs=[str(tmp_path / name)])
    assert all(part in str(caught.value) for part in expected), caught.value
    assert ("--json-keys" in str(caught.value)) == (name == "in.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_stays_of_a_run_that_finished_no_shard(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "in.jsonl.gz"
    damaged.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged or incomplete"):
        run_job(folder, tmp_path / "new" / "corpus", inputs=[str(damaged)])
    assert list(tmp_path.iterdir()) == [damaged]


def test_no_end_tokens_where_none_are_wanted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo words")
    made = run_job(
        folder,
        tmp_path / "corpus",
        inputs=[str(tmp_path / "in.txt")],
        reading=RecordFormat("text", "line"),
        append_eod=False,
    )
    assert made is not None
    assert (made.documents, made.empty_documents) == (2, 1)
    tokenizer = SentencePieceTokenizer(folder / "spm.model")
    dataset = IndexedDataset(tmp_path / "corpus")
    ids = dataset.tokens(0, dataset.token_count).tolist()
    assert ids == tokenizer.encode("one") + tokenizer.encode("two words")


def test_a_hugging_face_tokenizer_and_texts_that_it_drops(folder: Path, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "one": 1, "two": 2, "?": 3}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("one two\n  \ntwo three </s>\n")
    for append_eod in (True, False):
        made = run_job(
            folder,
            tmp_path / "corpus",
            inputs=[str(tmp_path / "in.txt")],
            tokenizer_path=tmp_path,
            reading=RecordFormat("text", "line"),
            append_eod=append_eod,
            overwrite=True,
        )
        assert made is not None
        assert (made.documents, made.empty_documents, made.text_bytes) == (2, 1, 21)
        dataset = IndexedDataset(tmp_path / "corpus")
        end = [0] if append_eod else []
        # The end token in a text is only text: three unknown words.
        assert dataset.tokens(0, dataset.token_count).tolist() == [1, 2, *end, 2, 3, 3, 3, 3, *end]
