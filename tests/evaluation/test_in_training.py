"""Tasks evaluated by a run while it trains: what is logged and recorded equals its checkpoint's scores."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_nexus.training.metrics import read_metrics
from tests.support import eval_model
from tests.support.cli import WARM, assert_refused, ended, summary
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.task_files import write_task_files
from tests.support.verbs import CallVerb

FLAGS = shlex.split(
    "--data-path corpus --split 8,2 --tokenizer-model tokenizer.model --vocab-size 400 --num-layers 2 "
    "--hidden-size 16 --num-attention-heads 2 --kv-channels 8 --ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 "
    "--seq-length 48 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 "
    "--lr 1e-2 --lr-warmup-iters 1 --eval-interval 0 --eval-iters 1 --fp32 "
    "--eval-tasks piqa,arc_easy,hellaswag --eval-task-path tasks"
)
TASKS = ("piqa", "arc_easy", "hellaswag")


@pytest.fixture
def folder(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for text in eval_model.TEXTS:
            writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eod_id]))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_path.read_bytes())
    write_task_files(tmp_path / "tasks")
    return tmp_path


def train(words: str, folder: Path, spawn: Spawn) -> tuple[int, str]:
    script = str(REPOSITORY / "pretrain_nexus.py")
    return ended(spawn([*WARM, script, *FLAGS, *shlex.split(words)], folder))


@pytest.mark.slow
def test_a_run_tells_what_its_checkpoint_scores(folder: Path, spawn: Spawn) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here: half a second

    code, output = train(
        "--tp 2 --save run --save-interval 2 --eval-tasks-interval 2 --tensorboard-dir board", folder, spawn
    )
    assert code == 0, output
    records = {r["step"]: r["tasks"] for r in read_metrics(folder / "run" / "metrics.jsonl") if "tasks" in r}
    assert records.keys() == {2, 4}
    assert all(tuple(tasks) == TASKS for tasks in records.values())
    assert output.count("tasks at ") == 2
    assert f"piqa acc {records[4]['piqa']['acc']:.4f}" in summary(output, "tasks")
    board = EventAccumulator(str(folder / "board")).Reload()
    assert [event.step for event in board.Scalars("hellaswag/acc_norm")] == [2, 4]
    for step, tasks in records.items():
        checkpoint = f"run/iter_{step:07d}"
        words = [
            "--load",
            checkpoint,
            "--tasks",
            ",".join(TASKS),
            "--task-path",
            "tasks",
            "--output",
            "o.json",
        ]
        tool = [*WARM, str(REPOSITORY / "tools" / "evaluate.py"), *words]
        code, output = ended(spawn(tool, folder))
        assert code == 0, output
        found = json.loads((folder / "o.json").read_text())["tasks"]
        assert {name: result["metrics"] for name, result in found.items()} == tasks


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("--eval-tasks winogrande", "ConfigError", "no local format is known for the task 'winogrande'"),
        ("--eval-task-path gone", "ConfigError", "has no file hellaswag.jsonl"),
        ("--eval-tasks ''", "ConfigError", "--eval-task-path tasks belongs to --eval-tasks"),
        ("--tokenizer-model ''", "ConfigError", "--eval-tasks piqa,arc_easy,hellaswag are texts"),
        ("--eval-tasks-limit -1", "ConfigError", "--eval-tasks-limit -1 must not be negative"),
    ],
)
def test_mistakes_are_answered_before_anything_starts(
    words: str,
    kind: str,
    expected: str,
    folder: Path,
    call_verb: CallVerb,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    code, output = call_verb("train", [*FLAGS, "--save", "run", *shlex.split(words)])
    assert_refused(code, output, kind, expected)
    assert not (folder / "run").exists()
