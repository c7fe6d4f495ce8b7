"""Tasks of lm-evaluation-harness, fetched or read from local files; sealed for `lm_eval` and `datasets`.

A task read from a local file is the harness' own configuration, included as it is, but for where its
records come from. The five of the paper are found by the names of their files: listing all tasks of the
harness takes half a minute.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import datasets
import lm_eval.tasks
import yaml
from lm_eval.api.task import Task

from megatron_nexus.errors import ConfigError, DataError, raise_problems
from megatron_nexus.evaluation.task_files import read_task_file, require_task_files, task_file
from megatron_nexus.log import Progress, logger

Tasks: TypeAlias = Mapping[str, Task]
"""Tasks by name."""

LISTED_NAMES = 3
_CONFIGURATIONS = {
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}


def open_tasks(
    names: Sequence[str],
    folder: Path | None,
    include_paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
) -> Tasks:
    """Return tasks by name, with records from the files of `folder`, or fetched without one.

    Tasks may also be those of the YAML files below `include_paths`, which go before those of the harness.
    `num_fewshot` is the number of examples before each question, but for tasks whose configuration says 0.

    Raises:
        ConfigError: a task is unknown, has no file, is none for a model of text, or has too few examples.
        DataError: a file is not a file of its task, or a data set cannot be had.
    """
    # One warns of settings that are meant so, the other of each try to reach the hub.
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tasks = _local_tasks(names, folder) if folder is not None else _fetched_tasks(names, include_paths)
    for name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"the task {name} needs images, or runs code that a model writes: leave it out")
        _set_num_fewshot(name, task, num_fewshot)
        task.set_fewshot_seed(seed=1234)  # the harness' own
    return tasks


def _set_num_fewshot(name: str, task: Task, asked: int | None) -> None:
    """Set the examples of a task as the harness does. Raises ConfigError where it has too few."""
    own = task.get_config("num_fewshot")
    if asked and own == 0:
        logger.info(
            "note: %s is zero-shot by its configuration: --num-fewshot %d does not count", name, asked
        )
    elif asked is not None or own is None:
        task.set_config(key="num_fewshot", value=asked or 0)
    if not asked or own == 0:
        return
    pool = task.fewshot_cfg
    has_other_docs = task.has_training_docs() or task.has_validation_docs()
    if pool.split is None and pool.samples is None and not has_other_docs:
        # The harness leaves a question out of its own examples only where their split is named.
        pool.split = task.config.test_split
    most = there = len(list(task.fewshot_docs() or ()))
    if task.fewshot_cfg.split == task.config.test_split:  # of these the question itself is no example
        most = max(0, there - 1)
    if asked > most:
        raise ConfigError(
            f"--num-fewshot {asked}: the task {name} has {there} records to take examples from: give at most "
            f"{most}"
        )


def read_local(task: str, path: str, **metadata: object) -> dict[str, datasets.Dataset]:
    """Return the records of a local task: the harness calls this with what the task's metadata holds."""
    return {"test": datasets.Dataset.from_list(read_task_file(Path(path), task))}


def _local_tasks(names: Sequence[str], folder: Path) -> Tasks:
    require_task_files(folder, names)
    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    with TemporaryDirectory() as made:
        files = []
        for name in dict.fromkeys(names):
            path = task_file(folder, name)
            read_task_file(path, name)
            settings = {
                "include": str(root / _CONFIGURATIONS[name]),
                "task": name,
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
                "dataset_kwargs": {"task": name, "path": str(path.resolve())},
            }
            file = Path(made) / f"{name}.yaml"
            reader = f"custom_dataset: !function {__name__}.{read_local.__name__}\n"
            file.write_text(yaml.safe_dump(settings) + reader)
            files.append(str(file))
        tasks: Tasks = manager.load(files)["tasks"]
    return tasks


def _fetched_tasks(names: Sequence[str], include_paths: Sequence[Path]) -> Tasks:
    root = Path(lm_eval.tasks.__file__).parent
    own = [str(path) for path in include_paths]
    try:
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=own)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--include-path {' '.join(own)}: {_first_line(error)}: correct the task files there"
        ) from error
    if not set(names) <= _CONFIGURATIONS.keys() | set(manager.all_tasks):
        with Progress("listing the tasks of lm-evaluation-harness"):
            manager = lm_eval.tasks.TaskManager(include_path=own)
        raise_problems(_unknown(name, manager, own) for name in names if name not in manager.all_tasks)
    known = manager.all_tasks
    specs = [name if name in known else str(root / _CONFIGURATIONS[name]) for name in dict.fromkeys(names)]
    try:
        with Progress("fetching the data of the tasks"):
            tasks: Tasks = manager.load(specs)["tasks"]
    except Exception as error:
        # A task file may call any function, and of its data datasets raises what its readers happen to.
        if set(names) & {name for name in manager.all_tasks if own}:
            raise DataError(
                f"a task of {', '.join(names)} cannot be opened ({_first_line(error)}): correct its file in "
                f"--include-path {' '.join(own)}, or what that names as its data"
            ) from error
        if not isinstance(error, OSError | ValueError | KeyError | yaml.YAMLError):
            raise
        raise DataError(
            f"the data of {', '.join(names)} cannot be fetched ({error}): fetch it where there is a network "
            "and bring the cache along (HF_HOME), or give local files with --task-path (in training "
            "--eval-task-path)"
        ) from error
    return tasks


def _unknown(name: str, manager: lm_eval.tasks.TaskManager, own: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, LISTED_NAMES)
    remedy = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks`"
    where = f" and --include-path {' '.join(own)} have" if own else " has"
    return f"lm-evaluation-harness {lm_eval.__version__}{where} no task {name!r}: {remedy}"


def _first_line(error: BaseException) -> str:
    """Return the first line of an error, or of its cause, which datasets wraps in one that says nothing."""
    lines = str(error.__cause__ or error).splitlines() or str(error).splitlines()
    return (lines or [type(error).__name__])[0]
