"""Run times: what a run records of its starts, and of its time outside the steps. Written by rank 0.

commands.jsonl has the command of each start, run_times.jsonl

    {"what": "start", "time": ...}                       a process of the run has started
    {"what": "training", "time": ...}                    its first step begins
    {"what": "evaluation", "time": ..., "seconds": ...}  training waited for it; `time` is its end
    {"what": "checkpoint", ...}, {"what": "lost", ...}   the same of a save, of steps that were given up
    {"what": "end", "time": ...}                         the process leaves as it should

Times are seconds since the epoch. Records are added and never changed, so they survive kills;
`training/effective_time.py` reads them, with the steps that are in metrics.jsonl.
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_nexus.base.json_text import fits, read_objects
from megatron_nexus.parallel.launcher_watch import process_age_s
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import Evaluation, GrowthMetrics, StepMetrics

COMMANDS_FILE, RUN_TIMES_FILE = "commands.jsonl", "run_times.jsonl"
SHORTEST_S = 1e-3
"""A wait that is not worth a record is shorter."""

What = Literal["start", "training", "evaluation", "checkpoint", "lost", "end"]


class RunTimes(Hook):
    """Records where the time of a run goes, on the rank that `writes`."""

    def __init__(self, run_dir: Path, writes: bool) -> None:
        """Record the start of this process, in a new folder with the first step: it may yet be refused."""
        self._path = run_dir / RUN_TIMES_FILE
        self._writes = writes
        self._in_span = self._trains = False
        self._stepped = time.perf_counter()
        self._started = time.time() - process_age_s()
        self._knows_start = self._path.exists()
        if self._knows_start:
            self._append("start", self._started)

    def begin_training(self) -> None:
        """Record that the first step begins."""
        self._trains = True
        self._stepped = time.perf_counter()
        if not self._knows_start:
            self._append("start", self._started)
        self._append("training", time.time())

    def after_step(self, metrics: StepMetrics) -> None:
        self._stepped = time.perf_counter()

    @contextmanager
    def span(self, what: What) -> Iterator[None]:
        """Record how long the block takes, unless it is in such a block already."""
        if self._in_span:
            yield
            return
        self._in_span, began = True, time.perf_counter()
        try:
            yield
        finally:
            self._in_span = False
            self.add(what, time.perf_counter() - began)

    def add(self, what: What, seconds: float) -> None:
        """Record that `seconds` up to now went into `what`."""
        if seconds >= SHORTEST_S:
            self._append(what, time.time(), seconds=seconds)

    def after_evaluation(self, found: Evaluation) -> None:
        """Record growth metrics, which are measured between steps."""
        if isinstance(found, GrowthMetrics):
            self.add("evaluation", found.seconds)

    def on_failure(self, error: BaseException) -> None:
        """Record the end, after a step that is not kept; nothing before the first step: it was refused."""
        if self._trains:
            self.add("lost", time.perf_counter() - self._stepped)
            self.on_end()

    def on_end(self) -> None:
        self._append("end", time.time())

    def _append(self, what: What, when: float, **more: float) -> None:
        if self._writes:
            _append_record(self._path, {"what": what, "time": round(when, 3), **more})


def log_command(run_dir: Path, words: Sequence[str], step: int) -> None:
    """Append the command that trains on from a step."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (run_dir / COMMANDS_FILE).open("a") as file:
        file.write(json.dumps({"step": step, "time": now, "command": shlex.join(words)}) + "\n")


def record_lost_steps(run_dir: Path, dropped: Sequence[Mapping[str, Any]]) -> None:
    """Record that a run takes steps again, for each start that took them.

    `dropped` are their records in metrics.jsonl: where the newest checkpoint is damaged, of several starts.
    """
    path = run_dir / RUN_TIMES_FILE
    steps = [record for record in dropped if "step_s" in record and "time" in record]
    begins = [event["time"] for event in read_run_times(path) if event["what"] == "start"] if steps else []
    by_start: dict[int, list[Mapping[str, Any]]] = {}
    for step in steps:
        by_start.setdefault(sum(begin <= step["time"] for begin in begins), []).append(step)
    for taken in by_start.values():
        seconds = sum(record["step_s"] for record in taken)
        last = max(record["time"] for record in taken)
        _append_record(path, {"what": "lost", "time": last, "seconds": seconds, "steps": len(taken)})


def read_run_times(path: Path) -> list[dict[str, Any]]:
    """Return the records of run_times.jsonl; what a crash cut short is left out."""
    return [
        record
        for record in read_objects(path)
        if isinstance(record.get("what"), str)
        and fits(record.get("time"), float)
        and fits(record.get("seconds", 0.0), float)
    ]


def _append_record(path: Path, record: Mapping[str, object]) -> None:
    """Add a record to a file. On a full disk it is left out: no run ends for it."""
    with suppress(OSError), path.open("a") as file:
        file.write(json.dumps(record) + "\n")
