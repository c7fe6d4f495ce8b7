"""Local files of tasks: what is not a record of its task is answered with file, line and remedy."""

import json
from pathlib import Path

import pytest

from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.evaluation.task_files import PAPER_TASKS, read_task_file, require_task_files, task_file
from tests.support.task_files import ITEMS, write_task_files


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_records_of_every_task_are_read(task: str, tmp_path: Path) -> None:
    folder = write_task_files(tmp_path)
    require_task_files(folder, PAPER_TASKS)
    path = task_file(folder, task)
    path.write_text(path.read_text() + "\n")
    assert len(read_task_file(path, task)) == ITEMS


def test_unknown_tasks_and_missing_files_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        require_task_files(tmp_path, ["piqa", "hellaswag", "winogrande"])
    assert len(raised.value.problems) == 2
    assert (
        "no local format is known for the task 'winogrande': there are those of piqa, openbookqa"
        in raised.value.problems[0]
    )
    assert "has no file hellaswag.jsonl" in raised.value.problems[1]


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("piqa", {"goal": None}, "has no text 'goal'"),
        ("piqa", {"label": 2}, "has the label 2, not 0 or 1"),
        ("hellaswag", {"endings": "a, b"}, "has no list of texts 'endings'"),
        ("hellaswag", {"label": ""}, "has the label '', not one of 0, 1, 2, 3"),
        ("openbookqa", {"choices": ["a", "b"]}, r"has no list of texts 'choices\.text'"),
        ("openbookqa", {"question_stem": 3}, "has no text 'question_stem'"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "has no label in 'choices"),
        ("arc_challenge", {"answerKey": "E"}, "has the answerKey 'E', not one of 1, 2, 3, 4"),
    ],
)
def test_a_record_of_another_shape_is_named(
    task: str, changes: dict[str, object], expected: str, tmp_path: Path
) -> None:
    path = task_file(write_task_files(tmp_path), task)
    lines = path.read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), **changes})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"{task}\.jsonl:5 {expected}"):
        read_task_file(path, task)


@pytest.mark.parametrize(("text", "expected"), [("", "has no records"), ("{", "is not JSON"), ("[1]", "no")])
def test_a_file_of_another_kind_is_named(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        read_task_file(path, "piqa")
