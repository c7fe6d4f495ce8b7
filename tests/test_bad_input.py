"""Bad input through the real command lines: one message with value, rule and remedy, code 2, nothing written.

To add a case, add a line to a table: the words after the small model's flags, the class of the error, what
the message must name. The last tables are of other tools and of mistakes that only a running job can find.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc, loads_with_crc
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.cli import train
from megatron_nexus.cli.main import main
from megatron_nexus.data.indexed_dataset import HEADER, IndexedDatasetWriter
from megatron_nexus.data.sentencepiece_tokenizer import train_sentencepiece_bpe
from tests.support.cli import PYTHON, SMALL, WARM, Command, assert_refused, commands, ended
from tests.support.paths import REPOSITORY
from tests.support.warm_programs import warm_bin

pytestmark = pytest.mark.slow

LONG = "x" * 300

FLAGS = [
    ("--lrr 1e-3", ["unknown flag --lrr: did you mean --lr?"]),
    ("--tp_size 2", ["unknown flag --tp_size"]),
    ("--fp16", ["unknown flag --fp16: use --bf16"]),
    ("--lr-warmup-tokens 100", ["unknown flag --lr-warmup-tokens: use --lr-warmup-samples"]),
    ("--lr fast", ["--lr", "'fast'"]),
    ("--lr", ["--lr", "expected one argument"]),
    ("--precision fp16", ["--precision", "'fp16'", "'bf16', 'fp32'"]),
    ("--preset nexusformer-1t", ["'nexusformer-1t'", "nexus presets"]),
    ("stray", ["'stray' belongs to no flag"]),
    ("--train-tokens many", ["--train-tokens many is not a number of tokens"]),
    ("--train-tokens 1M --train-iters 3", ["give one of them"]),
    ("--lr 0 --seed=-1 --kv-channels 7", ["3 problems", "--lr 0.0", "--seed -1", "use 8"]),
    ("--data-path corpus --train-data-path corpus", ["--data-path and --train-data-path"]),
    ("--config nowhere.yaml", ["nowhere.yaml: No such file", "give one that exists"]),
    ("--config broken.yaml", ["broken.yaml:3:", "correct the YAML"]),
    ("--config wrong.yaml", ["2 problems", "unknown model.num_layer:", "num_layers", "must be a number"]),
    ("--deepspeed_config nowhere.json", ["nowhere.json: No such file"]),
    ("--deepspeed_config ds.json", ["train_batch_size is 7", "make it 4", "--global-batch-size"]),
    ("--deepspeed_config monitor.json", ["monitor.json", "tensorboard.output_path", "not 5"]),
    ("--grow nexus_m=30", ["--grow 'nexus_m=30' needs a checkpoint to grow: give --load"]),
    ("--grow=", ["--grow is empty: write such as nexus_m=1088"]),
    (
        "--load kept --train-iters 1",
        ["--train-iters 1 is below the 2 iterations of kept", "give more, or 2 to"],
    ),
    ("--load kept --grow nexus_m=1", ["--nexus-m 1 is below the checkpoint's 20", "never shrinks"]),
    ("--load kept --grow 'nexus_m=30 nexus_m=40'", ["says nexus_m twice: keep one"]),
    ("--load kept --grow init=zero", ["names no size: write such as nexus_m=1088"]),
    ("--load kept --num-layers 3", ["--num-layers 3 is not the checkpoint's 2: drop"]),
    ("--load kept --preset nexusformer-240m", ["--preset", "is not the checkpoint's"]),
    ("--save kept", ["--save kept holds iter_0000002", "use --load kept", "or another --save"]),
    ("--save corpus.bin", ["--save corpus.bin is a file: give a folder"]),
    ("--save corpus.bin/new", ["--save corpus.bin/new lies below", "a file: give a folder"]),
    ("--preset tiny", ["--preset 'tiny'", "nexusformer-tiny is the nearest", "presets"]),
    ("--optimizer-impl apex", ["--optimizer-impl apex", "apex"]),
    (f"--save {LONG}", [f"--save {LONG[:100]}... (300 characters): File name too long", "a shorter name"]),
    (f"--load {LONG}", [f"--load {LONG[:100]}...", "a shorter name"]),
    ("--deepspeed_config nested.json", ["nested.json is not JSON (nested too deeply): correct it"]),
    ("--config values.yaml", ["values.yaml: day is out of range for month: correct the value"]),
]

CHECKPOINTS = [
    ("--load nowhere", ["nowhere: no such folder", "give another to load"]),
    ("--load kept/iter_0000009", ["no such checkpoint", "kept has", "iter_0000002"]),
    ("--load corpus.bin", ["corpus.bin is a file: give a run's folder"]),
    ("--load stranger", ["stranger: no complete checkpoint"]),
    ("--load future", ["future", "format version", "99"]),
    ("--load garbled", ["garbled", "manifest.json"]),
    ("--load infinite", ["infinite", "manifest.json", "Infinity is not a number of JSON"]),
    ("--load shortened --save new", ["shortened", "rank_00000"]),
    ("--load without-rank --save new", ["without-rank", "rank_00000"]),
]

DATA = [
    ("--data-path nowhere", ["nowhere.idx does not exist", "give the common prefix"]),
    ("--data-path corpus.bin", ["corpus.bin.idx does not exist", "without the ending"]),
    ("--data-path empty", ["empty.idx has 0 bytes", "write it again"]),
    ("--data-path foreign", ["foreign.idx begins with", "not a Megatron-LM index"]),
    ("--data-path version", ["version.idx has format version 7"]),
    ("--data-path cut", ["cut.bin has", "copy or write both files again"]),
    ("--data-path cut-index", ["cut-index.idx has", "its header promises"]),
    ("--data-path floats", ["floats.idx has the type code 6", "does not hold token ids"]),
    ("--data-path 0.5 corpus 0.5 nowhere", ["nowhere.idx does not exist"]),
    ("--data-path corpus --valid-data-path web=nowhere", ["nowhere.idx does not exist"]),
    ("--seq-length 2000", ["--seq-length 2000", "a larger corpus or shorter"]),
    ("--vocab-size 50", ["corpus.bin", "the vocabulary has 50 ids", "tokenize"]),
    ("--data-range 1B:2B", ["of corpus", "4,800 tokens"]),
    ("--split 0,0,0", ["0,0,0"]),
    ("--split a,b", ["a,b"]),
    ("--tokenizer-model nowhere.model", ["nowhere.model"]),
    ("--tokenizer-model corpus.bin", ["corpus.bin"]),
    (
        "--tokenizer-model small.model",
        ["small.model has 500 tokens, more than --vocab-size 97", "500 or more"],
    ),
    (
        "--vocab-size 500 --data-path mine --tokenizer-model other.model",
        ["mine", "small.model", "other.model"],
    ),
]

TABLE = [
    *((words, "ConfigError", named) for words, named in FLAGS),
    *((words, "CheckpointError", named) for words, named in CHECKPOINTS),
    *((words, "DataError", named) for words, named in DATA),
]

COLD = [FLAGS[0][0], CHECKPOINTS[0][0], DATA[0][0]]
"""One of each stage is answered by a cold interpreter, imports and all; so is the first of the tools."""
LATE = ["--optimizer-impl apex", "--vocab-size 50", "--deepspeed_config monitor.json"]
"""Found by a rank that trains."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A folder with a good corpus, a good checkpoint, and bad ones of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    for made in commands(folder, tmp_path_factory.mktemp("logs")):
        write_bad_corpora(made)
        code, output = made.run("--save kept --train-iters 2")
        assert code == 0, output
        write_bad_checkpoints(folder)
        (folder / "broken.yaml").write_text("model:\n  num_layers: [\n")
        (folder / "wrong.yaml").write_text("model: {num_layer: 2}\noptimizer: {lr: high}\n")
        (folder / "ds.json").write_text('{"train_batch_size": 7}')
        (folder / "monitor.json").write_text('{"tensorboard": {"enabled": true, "output_path": 5}}')
        yield made


def write_bad_corpora(command: Command) -> None:
    folder = command.folder
    index, tokens = (folder / "corpus.idx").read_bytes(), (folder / "corpus.bin").read_bytes()
    magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size])
    header = (version, code, sequences, boundaries)
    variants = {
        "empty": (b"", b""),
        "foreign": (os.urandom(len(index)), tokens),
        "version": (HEADER.pack(magic, 7, *header[1:]) + index[HEADER.size :], tokens),
        "floats": (HEADER.pack(magic, version, 6, sequences, boundaries) + index[HEADER.size :], tokens),
        "cut": (index, tokens[:-100]),
        "cut-index": (index[:-8], tokens),
    }
    for name, (idx, bin_) in variants.items():
        (folder / f"{name}.idx").write_bytes(idx)
        (folder / f"{name}.bin").write_bytes(bin_)
    text = [path.read_text() for path in sorted((REPOSITORY / "megatron_nexus/config").glob("*.py"))]
    train_sentencepiece_bpe(text, folder / "small.model", 500)
    train_sentencepiece_bpe(text[1:], folder / "other.model", 500)
    (folder / "text.jsonl").write_text('{"text": "def f(x): return x"}\n' * 100)
    (folder / "malformed.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "nothing.jsonl").write_text("")
    (folder / "nested.json").write_text("[" * 100_000)
    (folder / "values.yaml").write_text("training:\n  seed: 2001-02-30\n")
    words = "--input text.jsonl --output-prefix mine --tokenizer-model small.model --append-eod --workers 1"
    code, output = command.tool("preprocess_data.py", words)
    assert code == 0, output


def write_bad_checkpoints(folder: Path) -> None:
    kept = newest_checkpoint(folder / "kept")
    assert kept is not None
    (folder / "stranger").mkdir()
    (folder / "stranger" / "pytorch_model.bin").write_bytes(b"PK")
    for name in ("future", "garbled", "infinite", "shortened", "without-rank"):
        shutil.copytree(folder / "kept", folder / name)
    manifest = folder / "future" / kept.name / "manifest.json"
    text = manifest.read_text()
    assert '"format_version": ' in text
    head, _, rest = text.partition('"format_version": ')
    manifest.write_text(head + '"format_version": 99' + rest[len(rest) - len(rest.lstrip("0123456789")) :])
    (folder / "garbled" / kept.name / "manifest.json").write_text("{")
    record = loads_with_crc(text.encode())
    record["progress"]["tokens"] = float("inf")
    record.pop("crc32")
    (folder / "infinite" / kept.name / "manifest.json").write_text(dumps_with_crc(record))
    weights = folder / "shortened" / kept.name / "rank_00000.safetensors"
    os.truncate(weights, weights.stat().st_size - 64)
    (folder / "without-rank" / kept.name / "rank_00000.safetensors").unlink()


def contents(folder: Path) -> dict[str, int]:
    """Every file below, with its size; but for the shards with which preprocessing would go on."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.suffix != ".shards"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@pytest.mark.parametrize("words", [*COLD, *LATE])
def test_a_mistake_ends_a_process_with_one_message_and_nothing_is_written(
    command: Command, words: str
) -> None:
    before = contents(command.folder)
    kind, named = next((kind, named) for row, kind, named in TABLE if row == words)
    assert_refused(*command.run(words, PYTHON if words in COLD else WARM), kind, *named)
    assert contents(command.folder) == before


def test_every_mistake_is_answered_with_one_message_and_nothing_is_written(
    command: Command, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    def begin(*_: object) -> None:
        raise AssertionError("ranks begin")

    monkeypatch.chdir(command.folder)
    monkeypatch.setattr(train, "_train", begin)
    monkeypatch.setattr(train, "run_local_ranks", begin)
    before, interrupt = contents(command.folder), signal.getsignal(signal.SIGINT)
    for words, kind, named in TABLE:
        if words not in LATE:
            monkeypatch.setattr(sys, "argv", ["pretrain_nexus.py", *SMALL, *shlex.split(words)])
            with pytest.raises(SystemExit) as end:
                main("train")
            assert isinstance(end.value.code, int), words
            assert_refused(end.value.code, console.readouterr().err, kind, *named)
    signal.signal(signal.SIGINT, interrupt)
    assert contents(command.folder) == before


SMALL_MODEL = "--tokenizer-model small.model"
TOOLS = [
    ("preprocess_data.py", f"--input nowhere.jsonl --output-prefix x {SMALL_MODEL}", ["nowhere.jsonl"]),
    ("preprocess_data.py", "--input text.jsonl --output-prefix x --tokenizer-model nowhere", ["nowhere"]),
    ("preprocess_data.py", "--input text.jsonl --output-prefix x", ["--tokenizer-model"]),
    ("preprocess_data.py", f"--input text.jsonl --output-prefix mine {SMALL_MODEL}", ["mine"]),
    ("preprocess_data.py", f"--input text.jsonl --json-keys b --output-prefix x {SMALL_MODEL}", ["'b'"]),
    (
        "preprocess_data.py",
        f"--input text.jsonl --json-keys title text --output-prefix x {SMALL_MODEL}",
        ["--json-keys: 2 keys", "run once for each", "--data-path"],
    ),
    ("preprocess_data.py", f"--input nothing.jsonl --output-prefix x {SMALL_MODEL}", ["nothing"]),
    (
        "preprocess_data.py",
        f"--input malformed.jsonl --strict --output-prefix x {SMALL_MODEL}",
        ["malformed.jsonl:2"],
    ),
    ("preprocess_data.py", "--input text.jsonl --wrokers 1", ["flag --wrokers: did you mean --workers?"]),
    (
        "preprocess_data.py",
        "--input text.jsonl --output-prefix x --tokenizer-type GPT2BPE --vocab-file v --num-workers 1",
        ["3 problems", "SentencePiece .model", "--vocab-file: use --tokenizer-model", "use --workers"],
    ),
    ("grow_sharded_checkpoint.py", "--load kept --nexus-mm 200", ["--nexus-mm: did you mean --nexus-m?"]),
    ("inspect_data.py", "mine --bogus", ["unknown flag --bogus: drop it; see "]),
    ("inspect_checkpoint.py", "--load kept", ["unknown flag --load: give checkpoint without a flag"]),
    ("export_hf.py", "--load kept --save hf", ["unknown flag --save: use --output"]),
    ("inspect_data.py", "mine stray", ["'stray' belongs to no flag"]),
    ("plot_runs.py", "", ["required: RUN"]),
    ("inspect_data.py", "nowhere", ["nowhere"]),
    ("train_tokenizer.py", "--input nowhere --output x.model --vocab-size 500", ["nowhere"]),
    ("train_tokenizer.py", "--input text.jsonl --output x.json", ["x.json", "name it such as x.model"]),
    (
        "train_tokenizer.py",
        f"--input text.jsonl --output x.model --vocab-size {10**14}",
        [f"--vocab-size {10**14}", "2,147,483,647", "give fewer"],
    ),
    ("generate.py", f"--load kept --prompt x --seed {10**22}", ["--seed", f"{2**48:,}"]),
    (
        "evaluate.py",
        "--load kept --perplexity text.jsonl --output kept",
        ["--output kept is a folder: add the name of a file"],
    ),
    ("plot_runs.py", "kept --output kept", ["--output kept", "give a file such as losses.png"]),
    ("plot_runs.py", "kept --output losses", ["--output losses", "give a file such as losses.png"]),
    (
        "preprocess_data.py",
        f"--input {LONG} --output-prefix x {SMALL_MODEL}",
        ["--input xxx", "shorter name"],
    ),
    (
        "preprocess_data.py",
        f"--input text.jsonl --output-prefix {LONG} {SMALL_MODEL}",
        ["--output-prefix xxx", "shorter name"],
    ),
    ("convert_checkpoint.py", f"--load kept --save {LONG}", ["--save xxx", "shorter name"]),
    (
        "convert_checkpoint.py",
        "--load kept --save x --names nested.json",
        ["nested.json", "nested too deeply"],
    ),
]


@pytest.mark.parametrize(("name", "words", "named"), TOOLS, ids=[f"{n} {words}" for n, words, _ in TOOLS])
def test_tools_answer_alike(command: Command, name: str, words: str, named: list[str]) -> None:
    before = contents(command.folder)
    code, output = command.tool(name, words, PYTHON if (name, words) == TOOLS[0][:2] else WARM)
    assert code == 2, output
    assert "Traceback" not in output and "usage:" not in output
    assert all(part in output for part in named), output
    assert contents(command.folder) == before


def test_a_port_in_use_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        words = " ".join(f"{name}={value}" for name, value in launch.items())
        program = command.start("--save port", ["env", *words.split(), str(warm_bin() / "python")])
        assert_refused(*ended(program), "ConfigError", f"port: {port}", "MASTER_PORT")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB; the test's checkpoints are of 200 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(command: Command, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(400_000))
    code, output = command.run(f"--save {small_disk} --save-interval 1 --train-iters 9")
    assert_refused(code, output, "CheckpointError", "No space left on device", str(small_disk))
    kept = newest_checkpoint(small_disk)
    assert kept is not None and kept.name in output
    (small_disk / "ballast").unlink()
    code, output = command.run(
        f"--load {small_disk} --save after-full-disk --train-iters {int(kept.name[5:]) + 1}"
    )
    assert code == 0, output


def test_the_corpora_here_are_bad_by_what_was_done_to_them_alone(command: Command) -> None:
    for name in ("corpus", "mine"):
        code, output = command.tool("inspect_data.py", name)
        assert code == 0, output


def test_a_folder_without_permission_is_named(command: Command) -> None:
    code, output = command.run("--save /proc/nexus --train-iters 1")
    assert_refused(code, output, "CheckpointError", "--save /proc/nexus", "give a folder that can be written")


def test_tokens_beyond_the_vocabulary_are_refused_where_they_are_met(command: Command) -> None:
    with IndexedDatasetWriter(command.folder / "late", np.uint16) as writer:
        for n in range(60):
            writer.add_document(np.full(100, 96 if n else 40))
        writer.add_document(np.full(100, 97))
    code, output = command.run("--data-path late --split 1 --valid-data-path corpus --save late-run")
    assert_refused(code, output, "DataError", "late.bin", "97")
