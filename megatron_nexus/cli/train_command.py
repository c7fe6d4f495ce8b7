"""What a command line of `train` or `unlearn` asks for: flags, files, the checkpoint's manifest.

Each is read once.
Imports no torch: it answers on a login node.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.manifest import RunProgress
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.cli.unlearn_start import base_of, find_start
from megatron_nexus.config.command_line import Consumed, build, given_flags, merge_settings
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.config_file import read_config_file
from megatron_nexus.config.devices import Device, parse_device
from megatron_nexus.config.injection import InjectedFault, parse_faults
from megatron_nexus.config.presets import Value
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.growth.request import GrowthRequest, grown_config, model_before, read_request
from megatron_nexus.growth.settings import recorded_settings


@dataclass(frozen=True)
class Start(SavedRun):
    """The checkpoint that a run starts from, and what --grow asks of it."""

    growth: GrowthRequest | None
    has_grown: bool = False
    """Whether an earlier start of the same command has done what --grow asks for."""
    begins_unlearning: bool = False
    """Whether an unlearning run begins here, from the weights of another run."""


@dataclass(frozen=True)
class TrainCommand:
    """The flags of a run and what they mean; `start` is None where it begins with initial weights."""

    argv: list[str]
    config: RunConfig
    start: Start | None
    dry_run: bool
    world_size: int | None
    device: Device | None
    """The device that --dry-run plans for; None: this machine."""
    search: bool
    faults: tuple[InjectedFault, ...] = ()
    """What --inject asks for."""

    @property
    def checkpoint(self) -> Location | None:
        """The checkpoint that the run starts from."""
        return self.start.checkpoint if self.start else None

    @property
    def tokenizer_record(self) -> TokenizerRecord:
        """What the checkpoint keeps of its tokenizer."""
        return tokenizer_record(self.start.manifest) if self.start else NO_RECORD

    def planned_ranks(self, started: int) -> int:
        """Return the ranks that --dry-run plans for, of which a launcher has `started` some.

        As --world-size says, else as many as were started, else one copy of the model.
        """
        return self.world_size or (started if started > 1 else max(1, self.config.model_parallel_size))


def read_train_command(argv: list[str], verb: str = "train") -> TrainCommand:
    """Return what a command line of `verb` means.

    Flags win over a file, a file over a checkpoint's configuration or a preset.

    Raises:
        ConfigError: flags that are unknown, wrong or contradict the checkpoint.
        CheckpointError: --load names nothing that can be loaded.
    """
    given = given_flags(argv, verb)
    dry_run, size = "dry_run" in given, given.get("world_size")
    for name in ("world_size", "device", "search"):
        if name in given and not dry_run:
            shown = flag_of(name) if given[name] is True else f"{flag_of(name)} {given[name]}"
            raise ConfigError(f"{shown} belongs to --dry-run: add it, or drop {flag_of(name)}")
    device = parse_device(str(given["device"])) if "device" in given else None
    if "search" in given and device is None:
        raise ConfigError("--search compares predictions for a device: give --device, such as h100")
    if isinstance(size, int) and size < 1:
        raise ConfigError(f"--world-size {size} must be positive: give the number of ranks")
    if "config" in given:
        given = merge_settings(read_config_file(Path(str(given["config"]))), given)
    if verb == "train" and given.get("forget"):
        raise ConfigError(f"unlearning.forget {given['forget']} belongs to the verb unlearn: use that")
    start: Start | None
    if verb == "train":
        start = _start(given)
    else:
        source, begins = find_start(given)
        start = Start(**vars(source), growth=None, begins_unlearning=begins)
    if start is not None and (start.growth is not None or start.has_grown):
        given = _beside_growth(given, start)
    if start is None:
        config = build(given)
    elif verb == "unlearn":
        saved = base_of(start.config, start.begins_unlearning, given)
        done = RunProgress(0, 0, 0, 0) if start.begins_unlearning else start.manifest.progress
        given = vars(saved.unlearning) | given
        config = build(given, saved, Consumed(done.step, done.samples, done.tokens))
    else:
        done = start.manifest.progress
        saved = grown_config(start.config, start.growth) if start.growth else start.config
        config = build(given, saved, Consumed(done.step, done.samples, done.tokens))
        if (last := config.training.train_iters) < done.step:
            raise ConfigError(
                f"--train-iters {last} is below the {done.step} iterations of {start.checkpoint}: iterations "
                f"count from the run's beginning; give more, or {done.step} to validate without training"
            )
    world_size = size if isinstance(size, int) else None
    faults = parse_faults(words if isinstance(words := given.get("inject", ()), tuple) else ())
    return TrainCommand(argv, config, start, dry_run, world_size, device, "search" in given, faults)


def _beside_growth(given: Mapping[str, Value], start: Start) -> dict[str, Value]:
    """Return the flags that a growth leaves to be read.

    Without those that only repeat a size before it, as the command line of the smaller run has them, and,
    where an earlier start of this command has grown the model, without what belongs to that start.
    """
    if start.growth is not None:
        before = {name: getattr(start.config.model, name) for name in start.growth.sizes}
        before["preset"] = start.config.preset
        done: tuple[str, ...] = ()
    else:
        grown: Mapping[str, Any] = next(
            entry for entry in reversed(start.manifest.lineage) if "axes" in entry
        )
        before = {name: size for name, (size, _) in grown["axes"].items()}
        before["preset"] = start.config.preset.removesuffix("-grown")
        done = ("grow", "reset_optimizer")
    return {name: value for name, value in given.items() if name not in done and before.get(name) != value}


def _start(given: Mapping[str, Value]) -> Start | None:
    """Return what --load and --grow name; None without a checkpoint."""
    load, grow = str(given.get("load", "")), str(given.get("grow", ""))
    if load == "auto" and "save" not in given:
        raise ConfigError("--load auto needs --save: give the run's folder as --save, or name it as --load")
    if load == "auto":
        place = newest_checkpoint(location(str(given["save"])))
    else:
        place = location(load) if load else None
    if "grow" in given and not grow.strip():
        raise ConfigError("--grow is empty: write such as nexus_m=1088, or drop it")
    if place is None:
        if grow:
            raise ConfigError(f"--grow {grow!r} needs a checkpoint to grow: give --load")
        return None
    growth = read_request(grow) if grow else None
    if growth and (continued := _grown_before(given, place, growth)):
        return Start(**vars(continued), growth=None, has_grown=True)
    return Start(**vars(open_saved_run(place)), growth=growth)


def _grown_before(given: Mapping[str, Value], source: Location, growth: GrowthRequest) -> SavedRun | None:
    """Return the newest checkpoint in --save where an earlier start of this command has grown it.

    So a job that grows while loading can be requeued: its last growth is the one that --grow asks for, of a
    checkpoint of the run that --load names, which need no longer be there.
    """
    newest = newest_checkpoint(location(str(given["save"]))) if "save" in given else None
    if newest is None:
        return None
    saved = open_saved_run(newest)
    growths: list[Mapping[str, Any]] = [entry for entry in saved.manifest.lineage if "axes" in entry]
    if not growths:
        return None
    before = model_before(saved.config.model, growths[-1]["axes"])
    if not growth.made(before, recorded_settings(growths[-1])):
        return None
    same_sizes = all(getattr(saved.config.model, name) == size for name, size in growth.sizes.items())
    parent, named = str(growths[-1]["parent"]), str(source.resolve())
    return saved if same_sizes and named in (parent, parent.rpartition("/")[0]) else None
