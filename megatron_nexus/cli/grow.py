"""The verb `grow`: make a checkpoint a larger model, written for any topology.

    nexus grow --load runs/240m --save runs/300m --nexus-m 1088 --tp 4

Weights, moments and counters are carried over, and gradients reach every new weight. The function stays,
unless new layers are stacked, as they are by default.
Without a size to grow it reshards. No process group, no accelerator, no model: pieces of tensors are read,
filled and written, by one process, by --workers of them or by the ranks of mpirun, in bounded memory.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.cli.arguments import folder_on_disk
from megatron_nexus.cli.next_command import log_next_command, train_command
from megatron_nexus.config.command_line import preset_name
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import ParallelConfig, RunConfig
from megatron_nexus.config.schedule import next_length
from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.growth.request import GROWING, GrowthRequest, add_growth_flags, grown_config


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags; one that is not given leaves no attribute behind."""
    parser = FlagParser(
        "grow",
        "--load RUN --save FOLDER [flags]",
        description=(
            "Make a checkpoint a larger model, or, without a larger size, write it for another topology. The "
            "function stays, but for new layers: they are stacked (--depth-init copy keeps it). The source "
            "is never touched."
        ),
        argument_default=argparse.SUPPRESS,
    )
    add_writing_flags(parser)
    parser.add_argument("--preset", type=preset_name, metavar="NAME", help="grow to the sizes of this preset")
    add_growth_flags(parser)
    return parser


def add_writing_flags(parser: FlagParser) -> None:
    """Add the flags that say what to read and how to write it: folders, topology, workers, checks."""
    flag = parser.add_flag
    flag("--load", "a run's folder, or one checkpoint in it", required=True)
    flag("--save", "folder of the new checkpoint", default="")
    flag("--tp --tensor-model-parallel-size", "ranks that share each layer", type=int, default=1)
    flag("--pp --pipeline-model-parallel-size", "pipeline stages", type=int, default=1)
    flag("--workers", "processes that share the work (or use mpirun)", type=int, default=1)
    flag("--dry-run", "print what would be done, and write nothing", action="store_true", default=False)
    text = "compare the logits of both models in float64, layer by layer, before the new one is kept"
    flag("--verify", text, action="store_true", default=False)


def target_sizes(given: argparse.Namespace, saved: RunConfig) -> dict[str, int]:
    """Return the sizes that the flags and the preset ask for.

    Raises ConfigError: the preset is a model of another kind.
    """
    values = vars(given)
    sizes: dict[str, int] = {}
    if "preset" in values:
        preset = PRESETS[values["preset"]]
        kept = {f.name for f in dataclasses.fields(saved.model)} - set(GROWING) - {"init_method_std"}
        other = [
            f"--preset {values['preset']} has {name} = {preset[name]!r}, the checkpoint {value!r}, which "
            "growth cannot change: choose a preset of the same family"
            for name, value in vars(saved.model).items()
            if name in kept and preset.get(name, value) != value
        ]
        raise_problems(other)
        sizes |= {name: size for name in GROWING if isinstance(size := preset.get(name), int)}
    return sizes | {name: values[name] for name in GROWING if name in values}


def run(argv: list[str]) -> None:
    """Run `nexus grow` with the flags `argv`."""
    grow(make_parser().parse_args(argv))


def grow(given: argparse.Namespace) -> Path | None:
    """Grow as the flags say; errors and result as of `write_grown`."""
    saved = open_saved_run(location(given.load))
    return write_grown(given, saved, target_sizes(given, saved.config))


def write_grown(given: argparse.Namespace, saved: SavedRun, sizes: Mapping[str, int]) -> Path | None:
    """Grow the model of a saved run to `sizes`, as the flags say, and return the new checkpoint.

    Returns None where --dry-run says to write nothing. Raises ConfigError, CheckpointError.
    """
    source = saved.checkpoint
    request = GrowthRequest.from_flags({**vars(given), **sizes})
    parallel = ParallelConfig(tensor_model_parallel_size=given.tp, pipeline_model_parallel_size=given.pp)
    root = _target_folder(given.save, source, given.dry_run)
    after = dataclasses.replace(grown_config(saved.config, request), parallel=parallel)
    check(after, given.tp * given.pp)
    # torch is imported only now: wrong flags are answered at once.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with log.importing("torch"):
        from megatron_nexus.growth.apply import grow_checkpoint
        from megatron_nexus.growth.plan import plan_growth
        from megatron_nexus.growth.report import plan_table, size_lines, warnings
        from megatron_nexus.growth.worker_group import make_worker_group

    plan = dataclasses.replace(plan_growth(saved.config, request), after=after)
    group = make_worker_group(given.workers)
    log.configure(is_main_rank=group.comm.rank == 0)
    log.logger.info("%s %s", "growing" if plan.axes else "resharding", source)
    log.show(warnings(plan, saved))
    if given.dry_run:
        log.show(plan_table(plan))
    log.show(size_lines(plan))
    if given.dry_run:
        log.logger.info("nothing was written: --dry-run")
        return None
    made = grow_checkpoint(plan, source, root, group, given.verify)
    log.logger.info("wrote %s", made)
    flags = ["--tp", str(given.tp), "--pp", str(given.pp), "--load", str(root)]
    done = saved.manifest.progress.step
    if done >= plan.after.training.train_iters:
        flags += ["--train-iters", str(next_length(plan.after, done))]
    command = train_command(*flags, ranks=given.tp * given.pp)
    log_next_command(command, plan.after, bool(saved.manifest.tokenizer_fingerprint))
    return made


def _target_folder(save: str, source: Location, dry_run: bool) -> Path:
    """Return the folder to save in. Raises ConfigError where none is given or it holds checkpoints."""
    if not save:
        if dry_run:
            return Path()
        raise ConfigError("--save is missing: give a folder for the new checkpoint, or --dry-run")
    root = folder_on_disk("--save", save, source)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"--save {root} is a file: give a folder, or a name that does not exist yet")
    newest = newest_checkpoint(root)
    if newest is not None:
        raise ConfigError(
            f"--save {root} holds {newest.name}, and checkpoints are never overwritten: give another folder"
        )
    return root
