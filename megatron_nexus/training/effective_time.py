"""Effective time: where the hours of a run went, over all its starts, and the share that trained (ETTR).

    ETTR = time of the steps that were kept / time from the first start to the last sign of life

The effective training time ratio of ByteRobust (arXiv 2509.16293) and Llama 3 (arXiv 2407.21783, section
3.3.4): the denominator holds all that a run waits for, also between two starts. A kept step is one that no
later start has taken again and no rewind has given up; what the first step of a start takes beyond the median
step (compilation, memory) is start-up. Read from metrics.jsonl and run_times.jsonl of the run's folder.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from megatron_nexus.base.duration import duration
from megatron_nexus.base.json_text import fits
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from megatron_nexus.training.run_times import RUN_TIMES_FILE, read_run_times

Record = dict[str, Any]


@dataclass(frozen=True)
class EffectiveTime:
    """The seconds of a run by what they went into; all of them together are its `total_s`."""

    starts: int
    productive_s: float
    """Seconds of steps that are part of the model."""
    start_up_s: float
    """From the start of the process to the first step: imports, data, model, loading; and compilation."""
    checkpoint_s: float
    """While training waited for a save; what an asynchronous save writes is not counted."""
    evaluation_s: float
    """Validations, tests, tasks, growth metrics."""
    lost_s: float
    """Steps that were taken again, rewound or left out, and the way back."""
    down_s: float
    """From the last record of a start to the next start: a hang, the queue, a machine in repair."""
    other_s: float
    """Between steps: logging, hooks."""

    @property
    def total_s(self) -> float:
        """From the first start to the last sign of life."""
        return self.productive_s + sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """What is not productive, by name."""
        return {
            "start-up": self.start_up_s,
            "checkpoints": self.checkpoint_s,
            "evaluation": self.evaluation_s,
            "lost": self.lost_s,
            "down": self.down_s,
            "other": self.other_s,
        }

    @property
    def ettr(self) -> float:
        """The effective training time ratio, from 0 to 1."""
        return self.productive_s / self.total_s if self.total_s else 0.0

    def __str__(self) -> str:
        """Return the ratio and where the rest went, such as "ETTR 96.1 % of 3.2 h: start-up 2.0 %, ..."."""
        shares = {name: 100 * seconds / self.total_s for name, seconds in self.parts.items() if self.total_s}
        rest = ", ".join(f"{name} {share:.1f} %" for name, share in shares.items() if share >= 0.05)
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return (
            f"ETTR {100 * self.ettr:.1f} % of {duration(self.total_s)}{starts}{': ' + rest if rest else ''}"
        )


def effective_time(run_dir: Path) -> EffectiveTime | None:
    """Return where the time of a run went; None where its folder has no record of it."""
    events = read_run_times(run_dir / RUN_TIMES_FILE)
    # A start on a machine whose clock is behind may bear an earlier time than the one before it.
    begins = sorted(event["time"] for event in events if event["what"] == "start")
    if not begins:
        return None
    records = [
        record
        for record in read_metrics(run_dir / METRICS_FILE)
        if "loss" in record and fits(record.get("time"), float) and fits(record.get("step_s"), float)
    ]
    steps = sorted((r for r in records if r["time"] >= begins[0]), key=lambda record: record["time"])
    typical_s = median(record["step_s"] for record in steps) if steps else 0.0
    ends = pairwise([*begins, inf])
    parts = [
        _of_start(
            (begin, until),
            [event for event in events if begin <= event["time"] < until],
            [record for record in steps if begin <= record["time"] < until],
            typical_s,
        )
        for begin, until in ends
    ]
    return EffectiveTime(*map(sum, zip(*map(astuple, parts), strict=True)))


def _of_start(
    span: tuple[float, float], events: Sequence[Record], steps: Sequence[Record], typical_s: float
) -> EffectiveTime:
    """Return where the time of one start went; `typical_s` is the median of the run's steps."""
    begin, until = span
    end = max((record["time"] for record in [*events, *steps]), default=begin)

    def spent(what: str) -> float:
        return float(sum(event.get("seconds", 0.0) for event in events if event["what"] == what))

    training = next((event["time"] for event in events if event["what"] == "training"), end)
    # Where the first step was lost no other was slower for it.
    began_s = steps[0]["time"] - steps[0]["step_s"] if steps else inf
    is_first = began_s - training < max(1.0, typical_s)
    excess_s = max(0.0, steps[0]["step_s"] - typical_s) if is_first else 0.0
    kept_s = sum(record["step_s"] for record in steps if not record.get("skipped"))
    skipped_s = sum(record["step_s"] for record in steps if record.get("skipped"))
    productive_s = max(0.0, kept_s - excess_s)
    # An unlearning run is evaluated before its first step.
    before_s = sum(
        event.get("seconds", 0.0)
        for event in events
        if event["what"] == "evaluation" and event["time"] <= training
    )
    start_up_s = max(0.0, training - begin - before_s) + excess_s
    lost_s = spent("lost") + skipped_s
    checkpoint_s, evaluation_s = spent("checkpoint"), spent("evaluation")
    known_s = productive_s + start_up_s + lost_s + checkpoint_s + evaluation_s
    return EffectiveTime(
        starts=1,
        productive_s=productive_s,
        start_up_s=start_up_s,
        checkpoint_s=checkpoint_s,
        evaluation_s=evaluation_s,
        lost_s=lost_s,
        down_s=until - end if until < inf else 0.0,
        other_s=max(0.0, end - begin - known_s),
    )
