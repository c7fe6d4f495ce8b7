"""The command that evaluates, as users run it, and what it says of mistakes before a model is loaded."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.evaluation.task_files import PAPER_TASKS
from tests.cli.test_data_tools import call
from tests.support.task_files import write_task_files

Console = pytest.CaptureFixture[str]


def test_tasks_and_perplexity_are_told_and_written(
    run: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    folder = write_task_files(tmp_path / "tasks")
    (tmp_path / "held out.txt").write_text("The old man opens the door.\n" * 30)
    words = ("--load", run[0].parent, "--tasks", ",".join(PAPER_TASKS), "--task-path", folder, "--limit", 4)
    texts = ("--perplexity", tmp_path / "held out.txt", "--perplexity-stride", 16)
    output = ("--output", tmp_path / "out.json")
    code, out, err = call("evaluate", monkeypatch, console, *words, *texts, *output)
    assert code == 0, err
    record = json.loads((tmp_path / "out.json").read_text())
    assert tuple(record["tasks"]) == PAPER_TASKS
    assert record["step"] == 40 and record["checkpoint"] == str(run[0])
    assert record["tasks"]["hellaswag"]["items"] == 4
    perplexity = record["perplexity"][str(tmp_path / "held out.txt")]
    assert perplexity["bytes"] == 28 * 30
    table = out[out.index("  ".join(PAPER_TASKS)) :].splitlines()
    mean = sum(result["metrics"]["acc"] for result in record["tasks"].values()) / 5
    assert table[1].split()[-1] == f"{100 * mean:.2f}"
    assert f"{perplexity['per_token']:.4g} per token" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "nothing to evaluate: give --tasks"),
        (("--perplexity", "gone.txt"), "gone.txt: No such file or directory"),
        (("--perplexity", "empty.txt"), "empty.txt is empty"),
        (("--perplexity", "bytes.txt"), "bytes.txt is not UTF-8 text"),
        (("--perplexity", "a.txt", "--task-path", "."), "--task-path . belongs to --tasks"),
        (("--perplexity", "a.txt", "--output", "no/such/out.json"), "its folder does not exist"),
        (("--tasks", "piqa,arc", "--task-path", "."), "2 problems"),
        (("--tasks", "hellaswag", "--task-path", "tasks"), "hellaswag.jsonl:1 has no text 'activity_label'"),
        (("--load", "gone", "--tasks", "piqa"), "CheckpointError: gone: no such folder"),
    ],
)
def test_mistakes_are_answered(
    words: tuple[str, ...],
    told: str,
    run: tuple[Path, RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "hellaswag.jsonl").write_text("{}")
    code, _, err = call("evaluate", monkeypatch, console, "--load", run[0], *words)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_a_missing_extra_is_named(
    run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = call("evaluate", monkeypatch, console, "--load", run[0], "--tasks", "piqa")
    assert code == 2
    assert "pip install 'lm-eval>=" in err
