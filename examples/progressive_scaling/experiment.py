"""An experiment as its YAML file states it: shapes, schedules of stages, budgets, seeds.

A schedule is one WSD run: warm-up, a constant rate through all of its stages, one decay at the end. It grows
from each stage's shape to the next one's. A budget ends it: the FLOPs of all its stages, forward and backward
pass, the base's included. A schedule of one stage is a run from scratch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_nexus.cli.train_command import configure
from megatron_nexus.errors import ConfigError
from megatron_nexus.models.decoder import training_flops_per_token

TERA = 1e12
Flags = Mapping[str, str]
"""Flags of `nexus train` without their dashes, such as {"num-layers": "2"}."""


@dataclass(frozen=True)
class Stage:
    """A part of a schedule at one shape."""

    shape: str
    lr: float
    until: float = 0.0
    """TFLOP of the whole run, this stage included, at which it ends; 0 in the last stage."""
    grow: str = ""
    """What --grow takes besides the sizes: `depth_init=stack moments=copied`. In all stages but the first."""
    flags: str = ""
    """More flags of this stage, such as --new-lr-ratio 1.3."""
    decays: bool = False
    """Whether the stage ends with a decay of its own, and the next begins with a warm-up: two schedules."""


@dataclass(frozen=True)
class Schedule:
    """Stages with one learning rate each, the budgets at which the run ends, and the seeds."""

    name: str
    stages: tuple[Stage, ...]
    budgets: tuple[float, ...]
    """TFLOP of a whole run, each with its own decay from the common part."""
    steps: tuple[int, ...]
    """Or optimizer steps of a whole run."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Ceiling:
    """Two shapes whose difference from scratch at equal tokens says what a growth between them can gain."""

    axis: str
    small: str
    large: str


@dataclass(frozen=True)
class Experiment:
    """All of a configuration file."""

    train: Flags
    """Flags of every run."""
    shapes: Mapping[str, Flags]
    warmup_steps: int
    decay_share: float
    """Part of all steps that the decay takes."""
    min_lr_share: float
    """The last learning rate as a part of the stage's."""
    schedules: tuple[Schedule, ...]
    ceilings: tuple[Ceiling, ...] = field(default=())

    @cached_property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return int(self.train["global-batch-size"]) * int(self.train["seq-length"])

    @cached_property
    def flops_per_step(self) -> Mapping[str, float]:
        """FLOPs of an optimizer step, forward and backward pass, by shape."""
        found = {}
        for name, flags in self.shapes.items():
            config, _ = configure(words({**self.train, **flags}))
            found[name] = self.tokens_per_step * float(
                training_flops_per_token(config.model, config.training.seq_length)
            )
        return found


def words(flags: Flags) -> list[str]:
    """Return flags as words of a command line; `true` stands for a flag without a value."""
    return [
        word
        for name, value in flags.items()
        for word in ([f"--{name}"] if value == "true" else [f"--{name}", *value.split()])
    ]


def read_experiment(path: Path) -> Experiment:
    """Read a configuration file. Raises ConfigError with all problems of its entries."""
    try:
        given: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML ({error}): compare it with laptop.yaml") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} has no entries: compare it with laptop.yaml")
    known = {*Experiment.__dataclass_fields__}
    problems = [
        f"{path}: {name} is not known: remove it, or write one of {sorted(known)}"
        for name in given
        if name not in known
    ]
    problems += [
        f"{path}: {name} is missing: add it" for name in sorted(known - {"ceilings"}) if name not in given
    ]
    if problems:
        raise ConfigError(problems)
    shapes = {name: _flags(flags) for name, flags in given["shapes"].items()}
    try:
        experiment = Experiment(
            train=_flags(given["train"]),
            shapes=shapes,
            warmup_steps=int(given["warmup_steps"]),
            decay_share=float(given["decay_share"]),
            min_lr_share=float(given["min_lr_share"]),
            schedules=tuple(s for entry in given["schedules"] for s in _schedules(entry)),
            ceilings=tuple(Ceiling(**entry) for entry in given.get("ceilings", [])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: {error!r}: compare the entry with those of laptop.yaml") from error
    _check(experiment, path)
    return experiment


def _flags(given: Mapping[str, object]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()
    }


def _schedules(entry: Mapping[str, Any]) -> list[Schedule]:
    """Return the schedules of an entry: one for each of its `lrs`, where it has several."""
    made = []
    for lr in entry.get("lrs", [None]):
        stages = []
        for stage in entry["stages"]:
            values = {
                **stage,
                "lr": float(stage["lr"] if lr is None else lr),
                "until": float(stage.get("until", 0)),
            }
            stages.append(Stage(**values))
        name = entry["name"] if lr is None else f"{entry['name']} lr {float(lr):g}"
        budgets = tuple(float(b) for b in entry.get("budgets", []))
        made.append(
            Schedule(name, tuple(stages), budgets, tuple(entry.get("steps", [])), tuple(entry["seeds"]))
        )
    return made


def _check(experiment: Experiment, path: Path) -> None:
    problems = []
    stages: dict[str, tuple[Stage, ...]] = {}
    for schedule in experiment.schedules:
        if stages.setdefault(schedule.name, schedule.stages) != schedule.stages:
            problems.append(f"two schedules of different stages are named {schedule.name!r}: rename one")
    for schedule in experiment.schedules:
        for stage in schedule.stages:
            if stage.shape not in experiment.shapes:
                problems.append(f"{schedule.name}: shape {stage.shape} is not among shapes: add it there")
        ends = [stage.until for stage in schedule.stages[:-1]]
        if ends != sorted(set(ends)) or 0.0 in ends or schedule.stages[-1].until:
            problems.append(
                f"{schedule.name}: until {[stage.until for stage in schedule.stages]} must rise from stage "
                "to stage, and the last stage has none: correct them"
            )
        if not schedule.budgets and not schedule.steps:
            problems.append(f"{schedule.name}: neither budgets nor steps: add one of them")
    for ceiling in experiment.ceilings:
        for shape in (ceiling.small, ceiling.large):
            if shape not in experiment.shapes:
                problems.append(f"ceiling of {ceiling.axis}: shape {shape} is not among shapes: add it there")
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
