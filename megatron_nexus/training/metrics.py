"""Metrics of a run: lines on the console, metrics.jsonl, loggers, loss.png. Written by rank 0."""

import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, TextIO

from megatron_nexus.base.duration import duration
from megatron_nexus.base.json_text import fits, read_objects
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.errors import TrainingError, os_errors_as
from megatron_nexus.log import logger
from megatron_nexus.training.loggers import Logger

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
LOGGERS_S = 10.0
"""How long loggers may take to write that a run has failed, which keeps its error waiting."""

Curve = list[tuple[int, float]]
"""Losses in nats per token with their steps."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: nats per token, seconds, tokens per second; utilization of the devices.

    `gemm_fraction` is of the rate that matrix products had at the start, `mfu` of the devices' peak, None
    where that is not known.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    step_s: float
    tokens_per_s: float
    gemm_fraction: float
    mfu: float | None
    memory_bytes: int
    """The most that any rank has held, which the ranks share at --log-interval: see `PeakMemory`."""
    skipped: bool | None = None
    """True where the update was left out, by --spike-policy; else None."""
    time: float | None = None
    """When the step was over, in seconds since the epoch."""


class Evaluation(ABC):
    """What is measured between two steps: a record of metrics.jsonl, numbers for the loggers, a line."""

    step: int

    @property
    def record(self) -> dict[str, Any]:
        """The record, by default of all fields."""
        return dict(vars(self))

    @property
    @abstractmethod
    def tags(self) -> dict[str, float]:
        """The numbers by the names that loggers have for them."""

    @property
    def line(self) -> str:
        """What the console shows; "" for nothing."""
        return ""


@dataclass(frozen=True)
class Validation(Evaluation):
    """One validation: nats per token; bits per byte is None without a tokenizer, which knows the bytes.

    `name` is "validation", "validation web" of the named set web, or the same of "test".
    """

    name: str
    step: int
    validation_loss: float
    perplexity: float
    bits_per_byte: float | None

    @property
    def tags(self) -> dict[str, float]:
        return {f"lm loss {self.name}": self.validation_loss}

    def __str__(self) -> str:
        line = f"loss {self.validation_loss:.4f} nats/token | perplexity {self.perplexity:.2f}"
        if self.bits_per_byte is None:
            return f"{line} | bits per byte unknown without --tokenizer-model"
        return f"{line} | {self.bits_per_byte:.3f} bits per byte"

    @property
    def line(self) -> str:
        return f"{self.name} at {self.step} | {self}"


@dataclass(frozen=True)
class AnswerScores(Evaluation):
    """What a model knows of the answers of a set, "forget" or "retain": `training.answer_scorer` says what.

    Means over the answers; `nll` in nats per token.
    """

    name: str
    step: int
    nll: float
    probability: float
    exact_memorization: float
    extraction_strength: float

    @property
    def record(self) -> dict[str, Any]:
        return {"step": self.step, **self.tags}

    @property
    def tags(self) -> dict[str, float]:  # by the names that open-unlearning gives them
        return {
            f"{self.name}_nll": self.nll,
            f"{self.name}_Q_A_Prob": self.probability,
            f"{self.name}_exact_memorization": self.exact_memorization,
            f"{self.name}_extraction_strength": self.extraction_strength,
        }

    def __str__(self) -> str:
        return (
            f"nll {self.nll:.4f} nats/token | probability {self.probability:.4f} | exact memorization "
            f"{self.exact_memorization:.3f} | extraction strength {self.extraction_strength:.3f}"
        )

    @property
    def line(self) -> str:
        return f"{self.name} set at {self.step} | {self}"


@dataclass(frozen=True)
class TaskScores(Evaluation):
    """What the model reaches in tasks at a step: each metric by task, and the seconds that it took."""

    step: int
    tasks: Mapping[str, Mapping[str, float]]
    seconds: float

    @property
    def tags(self) -> dict[str, float]:
        return {f"{task}/{metric}": v for task, values in self.tasks.items() for metric, v in values.items()}

    def __str__(self) -> str:
        return " | ".join(
            f"{task} " + ", ".join(f"{metric} {value:.4f}" for metric, value in of_task.items())
            for task, of_task in self.tasks.items()
        )

    @property
    def line(self) -> str:
        return f"tasks at {self.step} | {self} | {self.seconds:.1f} s"


@dataclass(frozen=True)
class GrowthMetrics(Evaluation):
    """Numbers of each tensor at a step, old elements and new: `training.growth_metrics` says which."""

    step: int
    seconds: float
    growth_metrics: Mapping[str, Mapping[str, float]]

    @property
    def tags(self) -> dict[str, float]:  # the means over layers
        means = means_by_kind(self.growth_metrics)
        return {f"growth/{name}/{kind}": v for kind, values in means.items() for name, v in values.items()}

    def __str__(self) -> str:
        titles = {
            "grad_ratio": "gradient new / old",
            "update_ratio_old": "update / weight old",
            "update_ratio_new": "new",
            "dead_share_new": "dead new units",
        }
        means = means_by_kind(self.growth_metrics).values()
        medians = {title: [v[name] for v in means if name in v] for name, title in titles.items()}
        return " | ".join(f"{title} {median(found):.2g}" for title, found in medians.items() if found)

    @property
    def line(self) -> str:
        return f"growth metrics at {self.step} | {self} | {self.seconds:.1f} s"


@dataclass(frozen=True)
class Timers(Evaluation):
    """Seconds a step of the ranks since the last of these, by Megatron-LM's name: the least and the most."""

    step: int
    timers: Mapping[str, tuple[float, float]]

    @property
    def tags(self) -> dict[str, float]:
        return {f"{name}-time": most for name, (_, most) in self.timers.items()}


def means_by_kind(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean over layers of each number, by kind of tensor."""
    found: dict[str, dict[str, list[float]]] = {}
    for tensor, numbers in metrics.items():
        kind = re.sub(r"^layers\.\d+\.", "", tensor)  # attention.q.w_m
        for name, value in numbers.items():
            found.setdefault(kind, {}).setdefault(name, []).append(value)
    return {
        kind: {name: sum(values) / len(values) for name, values in numbers.items()}
        for kind, numbers in found.items()
    }


def utilization(gemm_fraction: float, mfu: float | None) -> str:
    """MFU, or what there is where no peak of the device is known."""
    return f"MFU {100 * mfu:.1f} %" if mfu is not None else f"{100 * gemm_fraction:.1f} % of measured GEMM"


class MetricsWriter:
    """Appends to a run's metrics. On resume, records of later steps than the checkpoint's are dropped."""

    def __init__(
        self,
        folder: Path,
        resumed_step: int,
        loggers: Sequence[Logger] = (),
        loss_name: str = "lm loss",
    ) -> None:
        """`loss_name` is what the loss of a step is called on the console and in the loggers."""
        self.path = folder / METRICS_FILE
        self.dropped: Sequence[Mapping[str, Any]] = ()
        """The records that were dropped last."""
        # What an unlearning run measures before its first step, a run from step 0 measures again.
        self._file = self._reopened(resumed_step or -1)
        self._loggers = loggers
        self._loss_name = loss_name

    def _reopened(self, last_step: int) -> TextIO:
        """Drop the records of later steps and return the file to append to."""
        records = read_metrics(self.path)
        kept = [record for record in records if record["step"] <= last_step]
        self.dropped = [record for record in records if record["step"] > last_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(self.path)
        return self.path.open("a", buffering=1)

    def rewind(self, step: int, record: Mapping[str, object]) -> None:
        """Drop the records of later steps and write why the run has gone back to this one."""
        self._file.close()
        self._file = self._reopened(step)
        self._write({"step": step, **record})

    def step(self, metrics: StepMetrics, train_iters: int, speak: bool, left_s: float | None = None) -> None:
        """Record a step, and show it on the console where `speak`; `left_s` is what the run still takes."""
        record = {name: value for name, value in asdict(metrics).items() if value is not None}
        self._write(record)
        self._scalars(
            metrics.step,
            {
                self._loss_name: metrics.loss,
                "learning-rate": metrics.learning_rate,
                "grad-norm": metrics.grad_norm,
                "tokens-per-second": metrics.tokens_per_s,
                "gemm-fraction": metrics.gemm_fraction,
                **({"mfu": metrics.mfu} if metrics.mfu is not None else {}),
                "memory-bytes": metrics.memory_bytes,
            },
        )
        if speak:
            logger.info(
                f"iteration {metrics.step:{len(str(train_iters))}}/{train_iters} | {self._loss_name} "
                f"{metrics.loss:.4f} | lr {metrics.learning_rate:.2e} | grad norm {metrics.grad_norm:.3f} | "
                f"{metrics.tokens_per_s:,.0f} tokens/s | {utilization(metrics.gemm_fraction, metrics.mfu)} | "
                f"mem {metrics.memory_bytes / 1e9:.2f} GB{f' | {duration(left_s)} left' if left_s else ''}"
            )

    def evaluation(self, found: Evaluation) -> None:
        """Record what was measured between two steps, and show it."""
        self._write(found.record)
        self._scalars(found.step, found.tags)
        if found.line:
            logger.info("%s", found.line)

    def _write(self, record: dict[str, Any]) -> None:
        remedy = "free some space, then resume from the newest checkpoint"
        with os_errors_as(TrainingError, self.path, remedy):
            self._file.write(json.dumps(record) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for each in self._loggers:
            each.log(step, values)

    def close(self, failed: bool = False) -> None:
        """Finish the files and the loggers; of a failed run they have LOGGERS_S: a service may be down."""
        if not failed:
            self._file.close()
            for each in self._loggers:
                each.finish(failed)
            return
        with suppress(OSError):  # of a full disk, which the run's error names
            self._file.close()
        deadline = time.monotonic() + LOGGERS_S
        ends = [Thread(target=each.finish, args=(failed,), daemon=True) for each in self._loggers]
        for end in ends:
            end.start()
        for end in ends:
            end.join(max(0.0, deadline - time.monotonic()))


def make_validation(name: str, step: int, loss: float, targets: int, target_bytes: int | None) -> Validation:
    """A validation from its mean loss in nats over `targets` tokens that stand for `target_bytes` bytes."""
    bits = loss * targets / (math.log(2.0) * target_bytes) if target_bytes else None
    return Validation(name, step, loss, math.exp(min(loss, 700.0)), bits)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; lines that a crash cut short are left out."""
    return [
        record
        for record in read_objects(path)
        if type(record.get("step")) is int
        and all(fits(record.get(name, 0.0), float) for name in ("loss", "validation_loss"))
    ]


def run_metrics(root: Location) -> list[dict[str, Any]]:
    """Return the records of a run's folder, which has none in an object store."""
    return read_metrics(root / METRICS_FILE) if isinstance(root, Path) else []


def training_curve(records: list[dict[str, Any]]) -> Curve:
    """Return the loss of each step."""
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def validation_curves(records: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return the losses of each validation or test set, by its name."""
    curves: dict[str, Curve] = {}
    for record in records:
        if "validation_loss" in record:
            curves.setdefault(record["name"], []).append((record["step"], record["validation_loss"]))
    return curves


def held_out_curve(records: list[dict[str, Any]]) -> Curve:
    """Return the losses of the validation set, of several the first; none of a run without."""
    curves = validation_curves(records).items()
    return next((curve for name, curve in curves if name.startswith("validation")), [])


def task_averages(records: list[dict[str, Any]]) -> Curve:
    """Return the mean accuracy over tasks at each step at which tasks were scored."""
    curve: Curve = []
    for record in records:
        tasks = record.get("tasks")
        scores = tasks.values() if isinstance(tasks, dict) else []
        accuracies = [s["acc"] for s in scores if isinstance(s, dict) and isinstance(s.get("acc"), float)]
        if accuracies:
            curve.append((record["step"], sum(accuracies) / len(accuracies)))
    return curve


def plot_losses(folder: Path, unigram_entropy: float | None, title: str) -> Path:
    """Draw the run's losses from its metrics file, with the corpus' unigram entropy as the line to beat."""
    from matplotlib.figure import Figure  # here: half a second that no start needs

    records = read_metrics(folder / METRICS_FILE)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training_curve(records), strict=True), linewidth=1, label="training")
    for name, points in validation_curves(records).items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="grey", label="unigram entropy of the corpus")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    draft = folder / f".tmp_{PLOT_FILE}"
    figure.savefig(draft, format="png")
    draft.replace(folder / PLOT_FILE)  # who looks at it finds all of it
    return folder / PLOT_FILE
