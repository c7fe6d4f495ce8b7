"""Results of an evaluation: a table with a column for each task, as the paper's Table 1, and JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_nexus.base.table import table


@dataclass(frozen=True)
class TaskResult:
    """What a model reaches in a task: each metric, with its standard error where that is known."""

    items: int
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]


def task_table(results: Mapping[str, TaskResult]) -> list[str]:
    """Return a table with a row for each metric in per cent and its error; means where all tasks have it."""
    names = list(results)
    metrics = list(dict.fromkeys(metric for result in results.values() for metric in result.metrics))
    rows = [["", *names, "average"]]
    for metric in metrics:
        values = [result.metrics.get(metric) for result in results.values()]
        known = [value for value in values if value is not None]
        average = sum(known) / len(known) if len(known) == len(values) else None
        rows.append([metric, *map(_cell, values), _cell(average)])
        errors = [result.standard_errors.get(metric) for result in results.values()]
        if any(error is not None for error in errors):
            rows.append(["  +-", *map(_cell, errors), ""])
    rows.append(["items", *(f"{result.items:,}" for result in results.values()), ""])
    return table(rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}" if abs(value) <= 1 else f"{value:.4g}"
