"""A run as its folder records it: configuration, metrics, lineage, commands; and what of these is missing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_nexus.base.json_text import fits, read_objects
from megatron_nexus.checkpoint.manifest import Manifest, read_manifest
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.config.command_line import build
from megatron_nexus.config.config_file import CONFIG_FILE, read_config_file
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.growth.generations import growths_of
from megatron_nexus.models.decoder import decoder_specs, training_flops_per_token
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.training.effective_time import EffectiveTime, effective_time
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics, training_curve, validation_curves
from megatron_nexus.training.run_times import COMMANDS_FILE


@dataclass(frozen=True)
class Growth:
    """An entry of a lineage: the checkpoint that was grown, the sizes, and the progress at that moment."""

    parent: Path
    axes: Mapping[str, Sequence[int]]
    settings: Mapping[str, Any]
    step: int
    tokens: int
    flops: int

    @property
    def parent_run(self) -> Path:
        """The folder of the run that was grown."""
        return self.parent.parent

    def __str__(self) -> str:
        """Return the sizes, as "nexus_m 112 to 224"."""
        return ", ".join(f"{name} {old:,} to {new:,}" for name, (old, new) in self.axes.items())


@dataclass(frozen=True)
class RecordedRun:
    """What a run's folder says; `notes` are sentences about what it lacks."""

    folder: Path
    name: str
    config: RunConfig | None
    records: Sequence[Mapping[str, Any]]
    growths: Sequence[Growth]
    commands: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    times: EffectiveTime | None = None
    """Where its time went; None where that is not recorded."""

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The records of optimizer steps."""
        return [record for record in self.records if "loss" in record]

    @property
    def is_unfinished(self) -> bool:
        """Whether it has steps left to take; so has one without a configuration, as far as is known."""
        return self.config is None or max(self.losses, default=0) < self.config.training.train_iters

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return dict(training_curve([*map(dict, self.records)]))

    @property
    def validations(self) -> dict[str, dict[int, float]]:
        """Validation loss by step, of each set."""
        curves = validation_curves([*map(dict, self.records)])
        return {name: dict(curve) for name, curve in curves.items()}

    @property
    def growth_metrics(self) -> dict[int, Mapping[str, Mapping[str, float]]]:
        """Growth metrics by step: numbers by tensor."""
        kind = Mapping[str, Mapping[str, float]]
        return {
            record["step"]: metrics
            for record in self.records
            if (metrics := record.get("growth_metrics")) and fits(metrics, kind)
        }

    @property
    def parameters(self) -> int | None:
        """The parameters of its model."""
        return parameter_count(decoder_specs(self.config.model).values()) if self.config else None

    @property
    def flops_per_token(self) -> int | None:
        """FLOPs per token of training, forward and backward."""
        if self.config is None:
            return None
        return training_flops_per_token(self.config.model, self.config.training.seq_length)

    def tokens(self) -> dict[int, float]:
        """Return the tokens that were read up to each step, those of its parents included."""
        counted = [record for record in self.steps if fits(record.get("tokens"), float)]
        return {record["step"]: float(record["tokens"]) for record in counted}

    def flops(self) -> dict[int, float]:
        """Return the FLOPs up to each step, those of its parents included; none without a configuration."""
        per_token = self.flops_per_token
        if per_token is None:
            return {}
        last = self.growths[-1] if self.growths else None
        spent, read = (last.flops, last.tokens) if last else (0, 0)
        return {step: spent + per_token * (tokens - read) for step, tokens in self.tokens().items()}

    def hours(self) -> dict[int, float]:
        """Return the hours that its own steps took, up to each."""
        total, found = 0.0, {}
        for record in self.steps:
            total += record["step_s"] / 3600 if fits(record.get("step_s"), float) else 0.0
            found[record["step"]] = total
        return found


def read_run(folder: Path, name: str) -> RecordedRun:
    """Return what a run's folder records; what cannot be read is a note."""
    notes: list[str] = []
    records = read_metrics(folder / METRICS_FILE)
    lines = [line for line in (folder / METRICS_FILE).read_bytes().splitlines() if line.strip()]
    if len(records) < len(lines):
        notes.append(
            f"{len(lines) - len(records)} of {len(lines)} lines of {METRICS_FILE} are cut short, or are not "
            "records of a step: they are left out"
        )
    config = _config(folder, notes)
    manifest = _manifest(folder, notes)
    lineage = manifest.lineage if manifest else ()
    begun = [place for place, entry in enumerate(lineage) if "unlearning" in entry]
    if begun:  # at step 0 of its own: earlier growths are those of its parent
        notes.append(f"it unlearns, from the weights of {lineage[begun[-1]]['parent']}")
        lineage = lineage[begun[-1] + 1 :]
    growths = [
        Growth(Path(g["parent"]), g["axes"], g.get("settings", {}), g["step"], g["tokens"], g["flops"])
        for g in growths_of(lineage)
    ]
    commands = [one for one in read_objects(folder / COMMANDS_FILE) if isinstance(one.get("command"), str)]
    times = effective_time(folder)
    run = RecordedRun(folder, name, config, records, growths, commands, (), times)
    return replace(run, notes=(*notes, *_progress_notes(run, manifest)))


def _progress_notes(run: RecordedRun, manifest: Manifest | None) -> Iterator[str]:
    steps = [*run.losses]
    if not steps:
        yield "no step is recorded: the run has not trained yet"
        return
    if run.config is not None and steps[-1] < run.config.training.train_iters:
        yield f"unfinished: step {steps[-1]:,} of {run.config.training.train_iters:,}"
    begun = run.growths[-1].step if run.growths else 0
    if steps[0] > begun + 1:
        yield (
            f"its metrics begin at step {steps[0]:,}: it continues a run of another folder, whose hours and "
            "losses are not counted here"
        )
    if manifest is None and run.config is not None:
        yield "no checkpoint here: whether the model has grown is not known"


def _config(folder: Path, notes: list[str]) -> RunConfig | None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        notes.append(f"no {CONFIG_FILE}: parameters, FLOPs and settings are not known")
        return None
    try:
        return build(read_config_file(path))
    except (ConfigError, OSError) as error:
        notes.append(
            f"{CONFIG_FILE} cannot be read, so parameters, FLOPs and settings are not known: {error}"
        )
        return None


def _manifest(folder: Path, notes: list[str]) -> Manifest | None:
    try:
        newest = newest_checkpoint(folder)
        return read_manifest(newest) if newest is not None else None
    except CheckpointError as error:
        notes.append(f"its checkpoints cannot be read, so its lineage is not known: {error}")
        return None
