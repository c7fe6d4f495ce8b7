"""What an experiment's losses say: frontier, ceilings, differences, saved compute, each with its interval.

All comparisons are paired by seed: the runs of a seed read the same samples in the same order, and a grown
run shares the first steps of its base. Intervals are Student's t over seeds.

The frontier at a budget is the lowest mean loss of any schedule from scratch, over shapes and learning rates.
Compute saved by a run of C FLOPs is 1 - C / C', where C' is what the reference needs for the same loss: the
mean curve of a schedule from scratch, E + A C^-a through its budgets, is read at its own loss at C plus the
run's paired difference to it. Against the frontier it is the least of the savings against all
schedules from scratch.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nexus.analysis.estimate import Estimate, estimate
from megatron_nexus.errors import ConfigError

REACH = 2.0
"""How far beyond its budgets, as a factor of FLOPs, a reference curve is read."""
EXPONENTS = np.geomspace(0.001, 3.0, 400)
"""Of a curve; the least is as good as a logarithm."""
SAME_BUDGET = 0.02
"""Runs whose FLOPs differ by less than this share have one budget: a budget is rounded to whole steps."""


@dataclass(frozen=True)
class Result:
    """One end of a schedule."""

    schedule: str
    seed: int
    loss: float
    """Validation loss, nats per token."""
    flops: float
    tokens: int
    steps: int
    growth_steps: tuple[int, ...]
    stages: tuple[Mapping[str, Any], ...]

    @property
    def is_grown(self) -> bool:
        """Whether the run has more than one shape."""
        return len({stage["shape"] for stage in self.stages}) > 1

    @property
    def shape(self) -> str:
        """The last one."""
        return str(self.stages[-1]["shape"])


def read_results(path: Path) -> list[Result]:
    """Read results.jsonl. Raises ConfigError at a line that is no result."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(result_of(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}, is not a result ({error}): remove it, or give the folder of the runs"
            ) from error
    return found


def result_of(record: Mapping[str, Any]) -> Result:
    """Return a line of results.jsonl as a result."""
    return Result(
        str(record["schedule"]),
        int(record["seed"]),
        float(record["loss"]),
        float(record["flops"]),
        int(record["tokens"]),
        int(record["steps"]),
        tuple(record["growth_steps"]),
        tuple(record["stages"]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method; NaN stays, and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected, worst = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - rank)))
        corrected[index] = worst
    return corrected


class Curve:
    """Mean loss by FLOPs: E + A C^-a by least squares; through two budgets A - a log C."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """`points` are pairs of FLOPs and loss."""
        flops, losses = np.array([x for x, _ in points]), np.array([y for _, y in points])
        self.low, self.high = float(flops.min()), float(flops.max())
        exponents = EXPONENTS if len(points) > 2 else EXPONENTS[:1]
        powers = (flops / self.high) ** -exponents[:, None]  # a line for each exponent: losses over powers
        centred, away = powers - powers.mean(axis=1, keepdims=True), losses - losses.mean()
        scales = centred @ away / (centred**2).sum(axis=1)
        misses = ((centred * scales[:, None] - away) ** 2).sum(axis=1)
        best = int(misses.argmin())
        self._exponent, self._scale = float(exponents[best]), float(scales[best])
        self._least = float(losses.mean() - self._scale * powers[best].mean())

    def loss(self, flops: float) -> float:
        """Return the loss at so many FLOPs."""
        return self._least + self._scale * math.pow(flops / self.high, -self._exponent)

    def needed(self, loss: float) -> float:
        """Return the FLOPs that give a loss; NaN where no more FLOPs help, or beyond the curve's reach."""
        if self._scale <= 0 or loss <= self._least:
            return math.nan
        log_flops = math.log(self.high) - math.log((loss - self._least) / self._scale) / self._exponent
        within = math.log(self.low / REACH) <= log_flops <= math.log(self.high * REACH)
        return math.exp(log_flops) if within else math.nan


class Runs:
    """The runs of one schedule, by budget and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = sorted(results, key=lambda result: result.flops)
        self.name = self.results[0].schedule
        self.first = self.results[0]

    def at(self, flops: float) -> dict[int, Result]:
        """Return the runs at a budget by seed."""
        return {r.seed: r for r in self.results if abs(r.flops / flops - 1) < SAME_BUDGET}

    def at_steps(self, steps: int) -> dict[int, Result]:
        """Return the runs of so many steps by seed."""
        return {r.seed: r for r in self.results if r.steps == steps}

    @property
    def budgets(self) -> list[float]:
        """The FLOPs of its runs, each budget once."""
        found: list[float] = []
        for result in self.results:
            if not found or result.flops / found[-1] - 1 > SAME_BUDGET:
                found.append(result.flops)
        return found

    def curve(self, seeds: Sequence[int]) -> Curve | None:
        """Return the mean loss of some seeds by FLOPs; None where fewer than two budgets have them all."""
        points = []
        for budget in self.budgets:
            runs = self.at(budget)
            if set(seeds) <= set(runs):
                found = [runs[seed] for seed in seeds]
                flops, losses = [r.flops for r in found], [r.loss for r in found]
                points.append((float(np.mean(flops)), float(np.mean(losses))))
        return Curve(points) if len(points) > 1 else None


class Study:
    """All results of an experiment, by schedule."""

    def __init__(self, results: Sequence[Result]) -> None:
        names = list(dict.fromkeys(result.schedule for result in results))
        self.runs = {name: Runs([r for r in results if r.schedule == name]) for name in names}
        self.scratch = {name: runs for name, runs in self.runs.items() if len(runs.first.stages) == 1}
        self.grown = {name: runs for name, runs in self.runs.items() if runs.first.is_grown}

    @property
    def budgets(self) -> list[float]:
        """FLOPs at which three or more shapes from scratch end, or all of them."""
        wanted = min(3, len({runs.first.shape for runs in self.scratch.values()}))
        every = sorted(b for runs in self.scratch.values() for b in runs.budgets)
        found: list[float] = []
        for budget in every:
            shapes = {runs.first.shape for runs in self.scratch.values() if runs.at(budget)}
            if len(shapes) >= wanted and (not found or budget / found[-1] - 1 > 2 * SAME_BUDGET):
                found.append(budget)
        return found

    def best(self, flops: float, seeds: Iterable[int], shape: str = "") -> Runs | None:
        """Return the schedule from scratch with the lowest mean at a budget, among those with all seeds.

        `shape` restricts it to a shape: its best learning rate.
        """
        wanted = set(seeds)
        candidates = []
        for runs in self.scratch.values():
            found = runs.at(flops)
            if found and wanted <= set(found) and shape in ("", runs.first.shape):
                candidates.append((float(np.mean([found[seed].loss for seed in wanted])), runs.name))
        return self.scratch[min(candidates)[1]] if candidates else None

    def differences(self, runs: Runs, flops: float, shape: str = "") -> tuple[Runs, dict[int, float]] | None:
        """Return the reference at a budget, and the paired difference to it of each seed.

        The reference is the best schedule from scratch, or that of a shape, over the most seeds that one of
        them shares with `runs`.
        """
        mine = runs.at(flops)
        shared: set[int] = set()
        for other in self.scratch.values():
            if shape in ("", other.first.shape):
                shared = max(shared, set(mine) & set(other.at(flops)), key=len)
        seeds = sorted(shared)
        reference = self.best(flops, seeds, shape) if seeds else None
        return (reference, _differences(runs, reference, flops, seeds)) if reference else None

    def saved(self, runs: Runs, flops: float, shape: str = "") -> Estimate | None:
        """Return the share of compute that a schedule saves at a budget against the frontier or a shape."""
        found = self.differences(runs, flops, shape)
        if found is None:
            return None
        seeds = sorted(found[1])
        estimates = []
        for other in self.scratch.values():
            curve = other.curve(seeds)
            if (
                shape not in ("", other.first.shape)
                or curve is None
                or not set(seeds) <= set(other.at(flops))
            ):
                continue
            shares = []
            for seed, difference in _differences(runs, other, flops, seeds).items():
                spent = runs.at(flops)[seed].flops
                shares.append(1 - spent / curve.needed(curve.loss(spent) + difference))
            if not any(math.isnan(share) for share in shares):
                estimates.append(estimate(shares))
        return min(estimates, key=lambda found: found.mean, default=None)


def _differences(runs: Runs, reference: Runs, flops: float, seeds: Sequence[int]) -> dict[int, float]:
    """Return the paired differences of two schedules at a budget.

    What a budget's rounding to whole steps leaves between their FLOPs is corrected by the reference's curve.
    """
    mine, theirs, curve = runs.at(flops), reference.at(flops), reference.curve(seeds)
    found = {}
    for seed in seeds:
        rounding = curve.loss(mine[seed].flops) - curve.loss(theirs[seed].flops) if curve else 0.0
        found[seed] = mine[seed].loss - theirs[seed].loss - rounding
    return found


def paired(runs: Mapping[int, Result], others: Mapping[int, Result]) -> Estimate | None:
    """Return the difference in loss of two schedules over the seeds that both have."""
    seeds = sorted(set(runs) & set(others))
    return estimate([runs[seed].loss - others[seed].loss for seed in seeds]) if seeds else None
