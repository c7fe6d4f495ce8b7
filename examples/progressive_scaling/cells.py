"""The runs that an experiment consists of, each with the run that it starts from.

    trunk    a stage at its constant learning rate, up to a step from which others start
    leaf     the decay of a schedule at one budget, and its validation

Schedules that begin alike share their trunks: a grown run starts from the very weights and samples of the
from-scratch run of its base, and a trunk serves all budgets.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from experiment import TERA, Experiment, Schedule, Stage, words

from megatron_nexus.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """One run of `nexus train`."""

    folder: Path
    words: tuple[str, ...]
    """Its flags, without --load, --grow and --save."""
    parent: "Cell | None"
    grow: str
    """The value of --grow; "" where the shape stays."""
    last_step: int

    @property
    def checkpoint(self) -> Path:
        """What it leaves."""
        return self.folder / f"iter_{self.last_step:07d}"

    def root(self) -> "Cell":
        """Return the run that this one goes back to."""
        return self.parent.root() if self.parent else self


@dataclass(frozen=True)
class Leaf:
    """The end of a schedule at one budget and seed."""

    schedule: Schedule
    seed: int
    cell: Cell
    tokens: int
    flops: float
    """Of all stages."""
    growth_steps: tuple[int, ...]


def leaves(experiment: Experiment, schedule: Schedule, seed: int, folder: Path) -> list[Leaf]:
    """Return the ends of a schedule at its budgets, the smallest first."""
    per_step = [experiment.flops_per_step[stage.shape] for stage in schedule.stages]
    ends, flops = [0], 0.0  # steps at which stages end, and the FLOPs up to the last of them
    for stage, cost in zip(schedule.stages[:-1], per_step, strict=False):
        steps = round((stage.until * TERA - flops) / cost)
        ends.append(ends[-1] + steps)
        flops += steps * cost
        if steps < 1:
            raise ConfigError(
                f"{schedule.name}: until {stage.until} leaves no step to {stage.shape}: raise it"
            )
    totals = {ends[-1] + round((budget * TERA - flops) / per_step[-1]) for budget in schedule.budgets}
    made = []
    for total in sorted(totals | set(schedule.steps)):
        branch = total - round(total * experiment.decay_share)
        if branch <= max(ends[-1], experiment.warmup_steps):
            raise ConfigError(
                f"{schedule.name}: a run of {total} steps decays from step {branch}, before its last growth "
                f"at {ends[-1]} or the end of its warm-up: raise the budget, or lower until"
            )
        cell = _chain(experiment, schedule.stages, seed, [*ends[1:], branch], folder)
        cell = _leaf(experiment, schedule.stages[-1], cell, total)
        done = flops + (total - ends[-1]) * per_step[-1]
        made.append(Leaf(schedule, seed, cell, total * experiment.tokens_per_step, done, tuple(ends[1:])))
    return made


def _chain(
    experiment: Experiment, stages: tuple[Stage, ...], seed: int, ends: list[int], folder: Path
) -> Cell:
    """Return the trunk of the last stage, up to the last of `ends`."""
    cell: Cell | None = None
    key, start = f"seed-{seed}", 0
    for index, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        sizes = experiment.shapes[stage.shape]
        flags = {**experiment.train, **_rate(experiment, stage), "seed": str(seed), "eval-iters": "0"}
        flags["lr-decay-style"] = "constant"
        if stage.decays:
            decay = round((end - start) * experiment.decay_share)
            flags |= {"lr-decay-style": "WSD", "lr-wsd-decay-iters": str(decay), "lr-decay-iters": str(end)}
        grow = ""
        if cell is None:
            flags |= sizes
        else:
            growth = experiment.growth(stages[index - 1].shape, stage)
            grow = f"{growth} growth_seed={seed}" if growth else ""
            if stages[index - 1].decays:
                flags |= {"lr-start-iter": str(start), "lr-decay-iters": "0"}
        line = (*words(flags), *stage.flags.split())
        name = f"{stage.shape} lr {stage.lr:g}" + (f" at {start}" if index else "")
        key += "/" + _slug(name, key, grow, *line)
        cell = Cell(folder / key / f"to-{end}", line, cell, grow, end)
        start = end
    assert cell is not None
    return cell


def _leaf(experiment: Experiment, stage: Stage, trunk: Cell, total: int) -> Cell:
    decay = {"lr-decay-style": "WSD", "lr-wsd-decay-iters": str(total - trunk.last_step)}
    kept = _without(trunk.words, ("lr-decay-style", "eval-iters"))
    line = (*kept, *words(decay), "--eval-iters", experiment.train["eval-iters"])
    return Cell(trunk.folder.parent / f"end-{total}", line, trunk, "", total)


def _rate(experiment: Experiment, stage: Stage) -> dict[str, str]:
    return {
        "lr": f"{stage.lr:g}",
        "min-lr": f"{stage.lr * experiment.min_lr_share:g}",
        "lr-warmup-iters": str(experiment.warmup_steps),
    }


def _without(line: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    """Return a command line without the named flags and their one value."""
    kept: list[str] = []
    skip = False
    for word in line:
        if skip:
            skip = False
        elif word.removeprefix("--") in names and word.startswith("--"):
            skip = True
        else:
            kept.append(word)
    return kept


def _slug(name: str, *identity: str) -> str:
    """Return a folder's name that is unique to all of `identity`."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:6]
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{digest}"
