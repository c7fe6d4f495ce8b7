"""Figures of an experiment, with 95 % intervals over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from analysis import Study
from experiment import TERA
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_nexus.analysis.estimate import Estimate, estimate

DPI = 110


def draw_frontier(study: Study, path: Path) -> Path | None:
    """Draw loss against FLOPs, from scratch and grown; right, the distance to the frontier."""
    if not study.budgets:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), dpi=DPI, layout="constrained")
    ends = []
    for runs in study.scratch.values():
        shape = runs.first.shape
        points = [b for b in runs.budgets if study.best(b, runs.at(b), shape) is runs]
        means = [estimate([r.loss for r in runs.at(b).values()]).mean for b in points]
        left.plot([b / TERA for b in points], means, ".-", color="0.75", linewidth=0.8, zorder=1)
        if points:
            ends.append((points[-1] / TERA, means[-1], shape))
    best = [(b, study.best(b, _most_seeds(study, b))) for b in study.budgets]
    frontier = [(b, estimate([r.loss for r in runs.at(b).values()])) for b, runs in best if runs]
    xs = [b / TERA for b, _ in frontier]
    top = max(e.mean for _, e in frontier) + 0.15
    _name_ends(left, [end for end in ends if end[1] < top], top)
    left.plot(
        xs,
        [e.mean for _, e in frontier],
        "k-o",
        linewidth=1.5,
        markersize=4,
        label="best shape from scratch",
        zorder=3,
    )
    left.fill_between(
        xs, [e.mean - _half(e) for _, e in frontier], [e.mean + _half(e) for _, e in frontier], color="0.85"
    )
    right.axhline(0, color="black", linewidth=1)
    grown = sorted(study.grown.values(), key=lambda runs: _gap(study, runs.name))
    for index, runs in enumerate(grown[:8]):
        means, gaps, budgets = [], [], []
        for budget in runs.budgets:
            found = study.differences(runs, budget)
            if found is None:
                continue
            budgets.append(budget / TERA)
            means.append(estimate([r.loss for r in runs.at(budget).values()]).mean)
            gaps.append(estimate(list(found[1].values())))
        shift = 1 + 0.012 * (index - 3.5)  # or the bars hide each other
        left.plot(
            budgets, means, "s-", color=f"C{index}", markersize=4, linewidth=1, label=runs.name, zorder=4
        )
        right.errorbar(
            [b * shift for b in budgets],
            [g.mean for g in gaps],
            [_half(g) for g in gaps],
            fmt="s-",
            color=f"C{index}",
            markersize=4,
            linewidth=1,
            capsize=3,
            label=f"{runs.name} ({gaps[-1].n if gaps else 0})",
        )
    _label(left, right, xs, top, bool(grown))
    return _save(figure, path)


def _label(left: Axes, right: Axes, xs: Sequence[float], top: float, has_grown: bool) -> None:
    """Name the axes of the two halves."""
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("TFLOP of the whole run, the base's included")
        axes.set_xticks(xs, [f"{x:.2g}" for x in xs])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_ylim(top=top)
    left.set_ylabel("validation loss, nats per token")
    right.set_ylabel("minus the best shape from scratch, paired, 95 %")
    left.legend(fontsize=7)
    if has_grown:
        right.legend(fontsize=7)


def draw_savings(study: Study, path: Path) -> Path | None:
    """Draw the compute that each grown schedule saves at its largest budget, with 95 % intervals."""
    rows = []
    for runs in study.grown.values():
        budget = runs.budgets[-1]
        frontier = study.saved(runs, budget)
        if frontier is not None:
            rows.append(
                (
                    f"{runs.name}, {budget / TERA:.3g} TFLOP ({frontier.n})",
                    frontier,
                    study.saved(runs, budget, runs.first.shape),
                )
            )
    if not rows:
        return None
    rows.sort(key=lambda row: row[1].mean)
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.32 * len(rows)), dpi=DPI, layout="constrained")
    _bars(axes, [row[1] for row in rows], -0.13, "C0", "against the best shape from scratch")
    _bars(axes, [row[2] for row in rows], 0.13, "C1", "against its target from scratch")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.set_xlabel("FLOPs saved at equal loss, %, with 95 % intervals (seeds)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8, loc="upper left")
    low = min(100 * row[1].mean for row in rows)
    axes.set_xlim(left=max(axes.get_xlim()[0], low - 40))
    return _save(figure, path)


def draw_ceilings(found: Sequence[tuple[str, Estimate]], path: Path) -> Path | None:
    """Draw what size is worth from scratch along each axis, at equal tokens."""
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.4 * len(found)), dpi=DPI, layout="constrained")
    _bars(axes, [e for _, e in found], 0.0, "C0", "")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{axis} ({e.n})" for axis, e in found])
    axes.set_xlabel("large minus small from scratch at equal tokens, nats per token, 95 % (seeds)")
    axes.grid(alpha=0.3, axis="x")
    return _save(figure, path)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str]], top: float) -> None:
    """Write a shape's name next to the end of each curve, no two of one budget on each other."""
    bottom = min(loss for _, loss, _ in ends)
    used: dict[float, float] = {}
    for x, loss, shape in sorted(ends, key=lambda end: (round(end[0], 1), end[1])):
        column = round(x, 1)
        y = max(loss, used.get(column, -math.inf) + (top - bottom) / 35)
        used[column] = y
        axes.annotate(shape, (x, y), fontsize=6, color="0.4", xytext=(4, -2), textcoords="offset points")


def _bars(axes: Axes, found: Sequence[Estimate | None], shift: float, colour: str, label: str) -> None:
    """Draw estimates next to each other; without an interval as an open circle."""
    scale = 100.0 if label else 1.0
    for y, e in enumerate(found):
        if e is None:
            continue
        face = "white" if math.isnan(e.half) else colour
        axes.errorbar(
            e.mean * scale,
            y + shift,
            xerr=_half(e) * scale,
            fmt="o",
            color=colour,
            markerfacecolor=face,
            markersize=5,
            capsize=3,
        )
    axes.plot([], [], "o", color=colour, label=label or None)


def _half(found: Estimate) -> float:
    return 0.0 if math.isnan(found.half) else found.half


def _most_seeds(study: Study, budget: float) -> set[int]:
    return max((set(runs.at(budget)) for runs in study.scratch.values()), key=len)


def _gap(study: Study, name: str) -> float:
    runs = study.grown[name]
    found = study.differences(runs, runs.budgets[-1])
    return float(np.mean(list(found[1].values()))) if found else math.inf


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    pyplot.close(figure)
    return path
