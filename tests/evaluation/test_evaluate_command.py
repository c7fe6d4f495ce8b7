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


@pytest.mark.slow  # the imports
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


OWN_TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "{{{{deed}}}} it"
doc_to_choice: ["by day", "by night"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with a task of the user's own, of local records, and one that is zero-shot."""
    folder = tmp_path / "own"
    folder.mkdir()
    for split, deeds in (("train", ("opens", "paints", "cuts", "lifts")), ("test", ("washes", "forgets"))):
        records = [{"deed": deed, "label": number % 2} for number, deed in enumerate(deeds)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yaml = OWN_TASK.format(folder=folder)
    (folder / "capitals.yaml").write_text(yaml)
    (folder / "zero.yaml").write_text(yaml.replace("capitals", "zero") + "num_fewshot: 0\n")
    return folder


@pytest.mark.slow  # the imports
def test_own_tasks_are_asked_with_examples_and_their_samples_are_written(
    run: tuple[Path, RunConfig],
    own_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    # As many as there are, as the 5 of a subject of MMLU.
    words = ("--load", run[0], "--tasks", "capitals,zero", "--include-path", own_tasks, "--num-fewshot", 4)
    more = ("--log-samples", "--output", tmp_path / "out.json", "--batch-size", 1)
    code, out, err = call("evaluate", monkeypatch, console, *words, *more)
    assert code == 0, err
    assert "zero is zero-shot by its configuration: --num-fewshot 4 does not count" in out
    prompts = {}
    for task in ("capitals", "zero"):
        lines = (tmp_path / f"out_samples_{task}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        prompts[task] = [sample["arguments"][0][0] for sample in samples]
        record = json.loads((tmp_path / "out.json").read_text())["tasks"][task]
        assert record["items"] == len(samples) == 2
        assert record["metrics"]["acc"] == sum(sample["acc"] for sample in samples) / 2
    assert prompts["zero"] == ["washes it", "forgets it"]
    answers = {"opens": "by day", "paints": "by night", "cuts": "by day", "lifts": "by night"}
    for prompt, asked in zip(prompts["capitals"], prompts["zero"], strict=True):
        *shots, question = prompt.split("\n\n")
        assert question == asked and len(shots) == 4
        assert all(shot == f"{shot.split()[0]} it {answers[shot.split()[0]]}" for shot in shots)
    code, _, err = call("evaluate", monkeypatch, console, *words[:-1], 9)
    assert code == 2 and "--num-fewshot 9: the task capitals has 4 records" in err and "at most 4" in err
    for contents in ("", "no JSON", None):
        (own_tasks / "test.jsonl").unlink()
        if contents is not None:
            (own_tasks / "test.jsonl").write_text(contents)
        code, _, err = call("evaluate", monkeypatch, console, *words)
        assert code == 2 and f"correct its file in --include-path {own_tasks}" in err, err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--perplexity", "a.txt", "--num-fewshot", 2), "--num-fewshot 2 belongs to --tasks"),
        (("--tasks", "piqa", "--log-samples"), "add --output scores.json"),
        (("--tasks", "piqa", "--include-path", "gone"), "--include-path gone is not a folder"),
        (("--tasks", "piqa", "--include-path", ".", "--task-path", "tasks"), "one after the other"),
        ((), "nothing to evaluate: give --tasks"),
        (("--perplexity", "gone.txt"), "--perplexity gone.txt: No such file or directory"),
        (("--perplexity", "gone.txt", "--load", "nowhere"), "2 problems"),
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
    expected: str,
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
    assert expected in err
    assert "Traceback" not in err


def test_a_missing_extra_is_named(
    run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = call("evaluate", monkeypatch, console, "--load", run[0], "--tasks", "piqa")
    assert code == 2
    assert "pip install 'lm-eval>=" in err
