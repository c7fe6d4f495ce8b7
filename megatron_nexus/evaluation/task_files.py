"""Task files: the data of the paper's five tasks as local JSON lines, in the columns of the published sets.

    piqa.jsonl           goal, sol1, sol2, label
    openbookqa.jsonl     question_stem, choices {text, label}, answerKey
    hellaswag.jsonl      activity_label, ctx_a, ctx_b, endings, label
    arc_easy.jsonl, arc_challenge.jsonl     question, choices {text, label}, answerKey

Needs no lm-evaluation-harness: wrong files are answered before it is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.base.json_text import parse_record
from megatron_nexus.errors import DataError, raise_problems
from megatron_nexus.extras import missing_packages

PAPER_TASKS = ("piqa", "openbookqa", "hellaswag", "arc_easy", "arc_challenge")
"""The tasks of the paper's Table 1."""

# The text fields of each task's records; the choices and the answer are apart.
_TEXTS = {
    "piqa": ("goal", "sol1", "sol2"),
    "openbookqa": ("question_stem",),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b"),
    "arc_easy": ("question",),
    "arc_challenge": ("question",),
}

Record = dict[str, Any]


def require_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """Look at all that can be known of tasks without the harness: that it is there, and local files.

    Raises ConfigError, DataError: the extra or a file is missing, or a file is none of its task.
    """
    if folder is not None:
        require_task_files(folder, tasks)
        for task in tasks:
            read_task_file(task_file(folder, task), task)
    raise_problems(missing_packages("eval", "tasks need"))


def task_file(folder: Path, task: str) -> Path:
    """Return the path of a task's records."""
    return folder / f"{task}.jsonl"


def require_task_files(folder: Path, tasks: Sequence[str]) -> None:
    """Raise ConfigError where a task has no local format or its file is missing."""
    problems = [
        f"no local format is known for the task {task!r}: there are those of {', '.join(PAPER_TASKS)}"
        for task in tasks
        if task not in PAPER_TASKS
    ]
    problems += [
        f"the folder of tasks {folder} has no file {task}.jsonl: put one there, or leave {task} out"
        for task in tasks
        if task in PAPER_TASKS and not task_file(folder, task).is_file()
    ]
    raise_problems(problems)


def read_task_file(path: Path, task: str) -> list[Record]:
    """Return the records of a task. Raises DataError, which names the first line that is not one; OSError."""
    records = []
    with naming_errors(path):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_record(line)
            problem = _problem(record, task)
        except ValueError as error:
            problem = f"is not JSON ({error})"
        if problem:
            raise DataError(f"{path}:{number} {problem}: fix the line, or remove it")
        records.append(record)
    if not records:
        raise DataError(f"{path} has no records: put one JSON object on each line")
    return records


def _problem(record: object, task: str) -> str:
    """Return what is wrong with a record of the task, "" if nothing is."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    for name in _TEXTS[task]:
        if not isinstance(record.get(name), str):
            return f"has no text {name!r}"
    if task == "piqa":
        return "" if record.get("label") in (0, 1) else f"has the label {record.get('label')!r}, not 0 or 1"
    if task == "hellaswag":
        endings = record.get("endings")
        if not _are_texts(endings):
            return "has no list of texts 'endings'"
        numbers = [str(number) for number in range(len(endings))]
        label = str(record.get("label"))
        return "" if label in numbers else f"has the label {label!r}, not one of {', '.join(numbers)}"
    choices = record.get("choices")
    if not isinstance(choices, dict) or not _are_texts(choices.get("text")):
        return "has no list of texts 'choices.text'"
    labels = choices.get("label")
    if not _are_texts(labels) or len(labels) != len(choices["text"]):
        return "has no label in 'choices.label' for each of 'choices.text'"
    answer = record.get("answerKey")
    return "" if answer in labels else f"has the answerKey {answer!r}, not one of {', '.join(labels)}"


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
