"""An experiment as its YAML file states it: shapes, schedules of stages, budgets, seeds.

A schedule is one WSD run: warm-up, a constant rate through all of its stages, one decay at the end. It grows
from each stage's shape to the next one's. A budget ends it: the FLOPs of all its stages, forward and backward
pass, the base's included. A schedule of one stage is a run from scratch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.request import grown_config, read_request
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
        return {
            name: self.tokens_per_step
            * float(training_flops_per_token(config.model, config.training.seq_length))
            for name, config in ((name, self.config_of(name)) for name in self.shapes)
        }

    def config_of(self, shape: str) -> RunConfig:
        """Return the configuration of a shape's runs. Raises ConfigError."""
        return read_train_command(words({**self.train, **self.shapes[shape]})).config

    def growth(self, before: str, stage: Stage) -> str:
        """Return what --grow takes to make a stage's shape of the shape `before`; "" where they are one."""
        sizes, old = self.shapes[stage.shape], self.shapes[before]
        grown = [f"{name.replace('-', '_')}={size}" for name, size in sizes.items() if old.get(name) != size]
        return " ".join([*grown, *stage.grow.split()] if grown else [])


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
    try:
        experiment = Experiment(
            train=_flags("train", given["train"]),
            shapes={
                n: _flags(f"shape {n}", flags) for n, flags in _mapping("shapes", given["shapes"]).items()
            },
            warmup_steps=int(_number("warmup_steps", given["warmup_steps"])),
            decay_share=_number("decay_share", given["decay_share"]),
            min_lr_share=_number("min_lr_share", given["min_lr_share"]),
            schedules=tuple(s for entry in _list("schedules", given["schedules"]) for s in _schedules(entry)),
            ceilings=tuple(_ceiling(entry) for entry in _list("ceilings", given.get("ceilings", []))),
        )
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
    _check(experiment, path)
    return experiment


def _mapping(
    where: str, given: object, needed: Sequence[str] = (), known: Sequence[str] = ()
) -> dict[str, Any]:
    """Return an entry of names and values, with all that are `needed`, and none but `known` ones if given."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {given!r}: write names with values, as in laptop.yaml")
    problems = [f"{where} has no {name}: add it" for name in needed if name not in given]
    problems += [
        f"{where}: {name} is not known: remove it, or write one of {', '.join(known)}"
        for name in given
        if known and name not in known
    ]
    if problems:
        raise ConfigError(problems)
    return given


def _list(where: str, given: object) -> list[Any]:
    if not isinstance(given, list):
        raise ConfigError(f"{where} is {given!r}: write a list, as in laptop.yaml")
    return given


def _number(where: str, given: object) -> float:
    try:
        return float(str(given))
    except ValueError:
        raise ConfigError(f"{where} {given!r} is not a number: give such as 0.5") from None


def _ceiling(given: object) -> Ceiling:
    names = tuple(Ceiling.__dataclass_fields__)
    return Ceiling(**_mapping("an entry of ceilings", given, names, names))


def _flags(where: str, given: object) -> dict[str, str]:
    return {
        str(name): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in _mapping(where, given).items()
    }


def _schedules(given: object) -> list[Schedule]:
    """Return the schedules of an entry: one for each of its `lrs`, where it has several."""
    known = ("name", "stages", "lrs", "budgets", "steps", "seeds")
    entry = _mapping("an entry of schedules", given, ("name", "stages", "seeds"), known)
    title, made = str(entry["name"]), []
    stages = _list(f"{title}: stages", entry["stages"])
    rates = _list(f"{title}: lrs", entry["lrs"]) if "lrs" in entry else [None]
    for lr in rates:
        name = title if lr is None else f"{title} lr {_number(f'{title}: lrs', lr):g}"
        budgets, steps, seeds = (
            [_number(f"{title}: {key}", one) for one in _list(f"{title}: {key}", entry.get(key, []))]
            for key in ("budgets", "steps", "seeds")
        )
        whole = tuple(map(int, steps)), tuple(map(int, seeds))
        made.append(Schedule(name, tuple(_stage(title, one, lr) for one in stages), tuple(budgets), *whole))
    return made


def _stage(schedule: str, given: object, lr: object) -> Stage:
    """Return a stage of a schedule, at the rate `lr` where the schedule has one."""
    where, known = f"{schedule}: a stage", tuple(Stage.__dataclass_fields__)
    stage = _mapping(where, given, ("shape",) if lr is not None else ("shape", "lr"), known)
    rate = _number(f"{where}: lr", stage["lr"] if lr is None else lr)
    return Stage(**{**stage, "lr": rate, "until": _number(f"{where}: until", stage.get("until", 0))})


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
    problems = problems or list(_refused(experiment))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])


def _refused(experiment: Experiment) -> Iterator[str]:
    """Yield what `nexus train` says of shapes and growths that it would refuse, once."""
    configs = {}
    for name in experiment.shapes:
        try:
            configs[name] = experiment.config_of(name)
        except ConfigError as error:
            yield from (f"shape {name}: {problem}" for problem in error.problems)
    seen = set()
    for schedule in experiment.schedules:
        for before, stage in pairwise(schedule.stages):
            text = experiment.growth(before.shape, stage)
            if not text or not {before.shape, stage.shape} <= configs.keys() or (before.shape, text) in seen:
                continue
            seen.add((before.shape, text))
            try:
                grown_config(configs[before.shape], read_request(text, "grow"))
            except ConfigError as error:
                yield from (f"{schedule.name}: {problem}" for problem in error.problems)
