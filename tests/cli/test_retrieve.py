"""The command that chooses what to unlearn, as users run it: its files, going on after a kill, refusals."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.answers import read_answers
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.data.tokenizer import open_tokenizer
from tests.support.cli import WARM, assert_refused, ended, run_tool, warm_ranks
from tests.support.eval_model import TEXTS, write_run, write_tokenizer
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

TOOL = "retrieve_unlearning_data.py"
FLAGS = "--load run --queries q.jsonl --sketch-size 256 --forget 8 --retain 8"
SHARDS = ("00000000.f32", "00000256.f32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, 300 samples of both forms, two queries, and the samples as a corpus."""
    folder = tmp_path_factory.mktemp("retrieve")
    tokenizer = write_tokenizer(folder)
    write_run(folder / "run", tokenizer)
    write_run(folder / "other", tokenizer, init_method_std=0.2)
    texts = [text.split(" Question")[0] for text in TEXTS]
    with (folder / "corpus.jsonl").open("w") as corpus:
        for number in range(300):
            words = texts[number % len(texts)].split(" ", 2)
            parts = {"prompt": " ".join(words[:2]), "answer": f" {words[2]}"}
            corpus.write(json.dumps({"text": "".join(parts.values())} if number % 3 else parts) + "\n")
    queries = [{"prompt": "A boy", "answer": " paints the river at night."}, {"text": "Nobody sees."}]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, queries)))
    encode = open_tokenizer(tokenizer).encode
    with IndexedDatasetWriter(folder / "documents", np.uint16) as writer:
        for text in texts[:20]:
            writer.add_document([*encode(text * 3), 0])  # longer than a sample of 48 tokens
    return folder


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("forget.jsonl", "retain.jsonl", "report.json")]


def test_a_search_that_was_killed_goes_on_bit_for_bit(folder: Path, spawn: Spawn) -> None:
    code, output = run_tool(spawn, folder, TOOL, f"{FLAGS} --corpus corpus.jsonl --output whole")
    assert code == 0, output
    lines = [json.loads(line) for line in (folder / "whole" / "forget.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == sorted(line["rank"] for line in lines)
    assert len(lines) == 8 and {line["side"] for line in lines} == {"forget"}
    corpus = read_answers(folder / "corpus.jsonl")
    chosen = read_answers(folder / "whole" / "forget.jsonl")
    assert [answer.fields() for answer in chosen] == [corpus[line["index"]].fields() for line in lines]
    report = json.loads((folder / "whole" / "report.json").read_text())
    assert report["samples"] == 300 and report["sketch_error"] == 1 / 16
    assert f"standard deviation {report['spread']:.4f}" in output and "1/sqrt(K), 0.0625" in output
    assert f"near-duplicates of queries left out: {report['near_duplicates_left_out']}" in output
    assert report["near_duplicates_left_out"] > 0  # the first query is in the corpus

    words = f"{FLAGS} --corpus corpus.jsonl --save-sketches kept --output resumed"
    program = spawn([*WARM, str(REPOSITORY / "tools" / TOOL), *words.split()], folder)
    wait_for(lambda: (folder / "kept" / SHARDS[0]).exists() or program.process.poll(), "the first shard")
    program.process.send_signal(signal.SIGKILL)
    program.end()
    assert not (folder / "kept" / SHARDS[1]).exists() and not (folder / "resumed").exists()
    before = (folder / "kept" / SHARDS[0]).stat().st_mtime_ns
    code, output = run_tool(spawn, folder, TOOL, words)
    assert code == 0, output
    assert (folder / "kept" / SHARDS[0]).stat().st_mtime_ns == before, "it is not computed again"
    assert files(folder / "resumed") == files(folder / "whole")

    # All sketches are there: other queries cost their own gradients, and what they belong to is checked.
    for flags, expected in (
        ("--load other", ["kept", "checkpoint", "give another folder"]),
        ("--seed 7", ["seed 1,234, not 7"]),
        ("--sketch-size 128", ["sketch_size 256, not 128"]),
        ("--normalise tensor", ["normalise whole, not tensor"]),
        ("--corpus q.jsonl --forget 1 --retain 1", ["corpus", "samples 300, not 2"]),
    ):
        code, output = run_tool(spawn, folder, TOOL, f"{words} {flags}")
        assert_refused(code, output, "ConfigError", *expected)
    (folder / "kept" / SHARDS[1]).write_bytes(b"short")
    code, output = run_tool(spawn, folder, TOOL, words)
    assert_refused(code, output, "DataError", SHARDS[1], "has 5 bytes", "remove it")


def test_a_corpus_of_documents_is_searched_by_two_ranks(folder: Path, spawn: Spawn) -> None:
    found = []
    for name, launcher, flags in (("alone", WARM, ""), ("two", warm_ranks(2), "--tp 2")):
        words = f"{FLAGS} --corpus documents --output {name} --retain-from random --combine rank {flags}"
        code, output = ended(spawn([*launcher, str(REPOSITORY / "tools" / TOOL), *words.split()], folder))
        assert code == 0, output
        lines = [json.loads(line) for line in (folder / name / "forget.jsonl").read_text().splitlines()]
        found.append({line["index"]: line["score"] for line in lines})
        assert all(set(line) == {"index", "score", "rank", "side", "text"} for line in lines)
    alone, two = found
    # float32 in two orders; samples at the edge may change places.
    assert len(alone.keys() & two.keys()) >= 7
    assert all(abs(alone[n] - two[n]) < 1e-3 for n in alone.keys() & two.keys())


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        ("--corpus nowhere.jsonl", "ConfigError", ["--corpus nowhere.jsonl", "No such file"]),
        ("--corpus nowhere", "DataError", ["nowhere.idx", "give .jsonl"]),
        ("--corpus documents corpus.jsonl", "ConfigError", ["--corpus", "one .bin/.idx pair"]),
        ("--corpus corpus.jsonl --forget 299", "ConfigError", ["--forget 299", "300 samples", "give less"]),
        ("--corpus corpus.jsonl --select threshold", "ConfigError", ["--threshold", "give both"]),
        ("--corpus corpus.jsonl --select threshold --threshold nan", "ConfigError", ["nan", "from -1 to 1"]),
        (
            "--corpus corpus.jsonl --sketch-size 9000000",
            "ConfigError",
            ["--sketch-size 9,000,000", "give less"],
        ),
        ("--corpus corpus.jsonl --tp 3", "ConfigError", ["--tp 3", "use 1, 2"]),
        ("--corpus corpus.jsonl --pp 9", "ConfigError", ["--pp 9", "--num-layers 2"]),
        ("--corpus corpus.jsonl --output q.jsonl", "ConfigError", ["--output q.jsonl", "give a folder"]),
        ("--corpus corpus.jsonl --queries run", "ConfigError", ["--queries run", "give a .jsonl file"]),
        (
            "--corpus nowhere --queries corpus.jsonl --load nope",
            "ConfigError",
            ["2 problems", "--corpus nowhere", "nope"],
        ),
        ("--corpus corpus.jsonl --load nowhere", "CheckpointError", ["nowhere"]),
    ],
)
def test_mistakes_are_answered_before_torch(
    flags: str, kind: str, expected: list[str], folder: Path, spawn: Spawn
) -> None:
    code, output = run_tool(spawn, folder, TOOL, f"{FLAGS} --output refused {flags}")
    assert_refused(code, output, kind, *expected)
    assert "importing torch" not in output and not (folder / "refused").exists()
