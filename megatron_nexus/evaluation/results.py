"""Results of an evaluation: a table with a column for each task, as the paper's Table 1, and JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_nexus.base.table import table
from megatron_nexus.evaluation.perplexity import Perplexity


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


def perplexity_line(perplexity: Perplexity) -> str:
    """Return a perplexity as a line of text."""
    return (
        f"perplexity {perplexity.per_token:.4g} per token, {perplexity.per_word:.4g} per word, "
        f"{perplexity.per_byte:.4g} per byte ({perplexity.bits_per_byte:.4f} bits per byte) over "
        f"{perplexity.tokens:,} tokens, {perplexity.words:,} words, {perplexity.bytes:,} bytes"
    )


def perplexity_record(perplexity: Perplexity) -> dict[str, float]:
    """Return a perplexity for JSON."""
    derived = ("per_token", "per_word", "per_byte", "bits_per_byte")
    return asdict(perplexity) | {name: getattr(perplexity, name) for name in derived}
