"""The curve of a saved run, from its metrics, its configuration and its lineage. Reads no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_nexus.advice.curve import Array, Curve, GrownFrom, Point, Size
from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.growth.generations import growths_of
from megatron_nexus.models.decoder import decoder_specs, training_flops_per_token
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.training.metrics import METRICS_FILE, held_out_curve, run_metrics

BINS = 40
"""Means of training losses that stand in where a run was not validated often enough."""
LEAST_VALIDATIONS = 8


@dataclass(frozen=True)
class RunCurve:
    """A saved run with its curve; FLOP/s as its last steps had them, None without metrics of any.

    `validated`: whether the curve has losses of the validation set, not training losses.
    """

    saved: SavedRun
    root: Location
    curve: Curve
    flops_per_s: float | None
    validated: bool


def size_of(model: ModelConfig, seq_length: int, name: str) -> Size:
    """Return what a model counts."""
    parameters = parameter_count(decoder_specs(model).values())
    return Size(name, parameters, training_flops_per_token(model, seq_length))


def read_runs(places: Sequence[Location]) -> list[RunCurve]:
    """Read several runs, whose curves are all of validation losses, or all of training losses.

    Of one run the two differed by 0.03 nats where it was measured, as much as many a growth gains.
    """
    runs = [read_run(place) for place in places]
    if len({run.validated for run in runs}) > 1:
        runs = [read_run(place, by_validation=False) for place in places]
    return runs


def read_run(place: Location, by_validation: bool = True) -> RunCurve:
    """Read a run's folder, or its curve up to one of its checkpoints.

    By validation losses where there are enough, unless told otherwise. Raises CheckpointError, and
    ConfigError where the run has no metrics to read a curve from.
    """
    saved = open_saved_run(place)
    root = saved.checkpoint.parent
    records = run_metrics(root)
    steps = [r for r in records if _is_step(r)]
    if not steps:
        raise ConfigError(
            f"{root} has no {METRICS_FILE} with steps, and advice is drawn from losses: give the folder "
            "that the run was trained in"
        )
    model, length = saved.config.model, saved.config.training.seq_length
    size = size_of(model, length, saved.config.preset)
    growths = growths_of(saved.manifest.lineage)
    start, grown = 0.0, None
    if growths:
        sizes: dict[str, Any] = {name: old for name, (old, _) in growths[-1]["axes"].items()}
        base = size_of(replace(model, **sizes), length, "base")
        start = _area_before(growths[-1])
        grown = GrownFrom(float(growths[-1]["tokens"]), start, float(growths[-1]["flops"]), base)
    peak = saved.config.optimizer.lr
    areas = _areas(steps, peak, start, grown.tokens if grown else 0.0)
    points = _validations(held_out_curve(records), steps, areas, peak) if by_validation else []
    if not (validated := bool(points)):
        points = _training_losses(steps, areas, peak)
    rates = [r["tokens_per_s"] for r in steps[-20:] if isinstance(r.get("tokens_per_s"), float)]
    rate = float(np.median(rates)) * size.flops_per_token if rates else None
    seen = tuple(point for point in points if point.tokens <= saved.manifest.progress.tokens)
    return RunCurve(saved, root, Curve(str(place), size, seen, grown), rate, validated)


def _is_step(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(name), int | float) for name in ("loss", "learning_rate", "tokens"))


def _area_before(growth: Mapping[str, Any]) -> float:
    """Return the area that a growth's parent had trained, or its tokens where its metrics are gone."""
    tokens = float(growth["tokens"])
    try:
        parent = location(str(growth["parent"]))
        records = [r for r in run_metrics(parent.parent) if _is_step(r) and r["step"] <= growth["step"]]
        peak = open_saved_run(parent).config.optimizer.lr
    except (CheckpointError, OSError):
        return tokens
    return float(_areas(records, peak, 0.0, 0.0)[-1]) if records else tokens


def _areas(steps: Sequence[Mapping[str, Any]], peak: float, start: float, first_token: float) -> Array:
    tokens = np.array([r["tokens"] for r in steps], float)
    rates = np.array([r["learning_rate"] for r in steps], float) / peak
    # A file that begins later, as of a resumed run whose first part is gone, goes on from the peak.
    each = np.diff(tokens, prepend=first_token)
    return start + np.cumsum(each * rates)


def _validations(
    curve: Sequence[tuple[int, float]], steps: Sequence[Mapping[str, Any]], areas: Array, peak: float
) -> list[Point]:
    """Return the points of the validation set; none where there are too few."""
    index = {r["step"]: i for i, r in enumerate(steps)}
    found = [
        Point(float(steps[i]["tokens"]), float(areas[i]), steps[i]["learning_rate"] / peak, loss)
        for step, loss in curve
        if (i := index.get(step)) is not None
    ]
    return found if len(found) >= LEAST_VALIDATIONS else []


def _training_losses(steps: Sequence[Mapping[str, Any]], areas: Array, peak: float) -> list[Point]:
    """Return the means of training losses over `BINS` equal parts of the steps."""
    points = []
    for part in np.array_split(np.arange(len(steps)), min(BINS, len(steps))):
        loss, rate = (float(np.mean([steps[i][of] for i in part])) for of in ("loss", "learning_rate"))
        middle = steps[int(part[len(part) // 2])]
        points.append(Point(float(middle["tokens"]), float(areas[part[len(part) // 2]]), rate / peak, loss))
    return points
