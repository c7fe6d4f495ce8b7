"""The verbs `train` and `unlearn`, from the command line to a run: read, check, start ranks, train.

torch and DeepSpeed are imported only by the ranks that train, after the checks: a wrong flag is answered
at once. `training.run.train` continues from here.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_nexus import log
from megatron_nexus.base.imports import gc_paused
from megatron_nexus.base.invocation import program_words
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.cli.rank_process import end_refused_rank, importing_torch, run_rank
from megatron_nexus.cli.run_files import open_files
from megatron_nexus.cli.train_command import Start, TrainCommand, read_train_command
from megatron_nexus.cli.unlearn_start import check_not_unlearned
from megatron_nexus.config.config_file import config_text
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.injection import check_faults
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import RunData
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.unlearning_samples import UnlearningSamples
from megatron_nexus.errors import NexusError, path_errors
from megatron_nexus.parallel.launcher_watch import stop_without_launcher
from megatron_nexus.parallel.local_ranks import missing_ranks, run_local_ranks
from megatron_nexus.parallel.world import World, read_world

if TYPE_CHECKING:
    from megatron_nexus.checkpoint.store import StateReader
    from megatron_nexus.training.scoring import TaskEvaluator


def run(argv: list[str], verb: str = "train") -> NoReturn:
    """Run `nexus train`, or `nexus unlearn`, with the flags `argv` and end the process."""
    world = None
    try:
        world = read_world(os.environ)
        log.configure(is_main_rank=world.rank == 0)
        if world.rank and {"-h", "--help", "--version"}.intersection(argv):
            sys.exit(0)  # rank 0 prints it
        with path_errors():
            command = read_train_command(argv, verb)
            if command.dry_run:
                _dry_run(command, world)
            needed = command.config.model_parallel_size
            starts_ranks = missing_ranks(world, needed)
            config, ranks = command.config, needed if starts_ranks else world.size
            check(config, ranks)
            check_faults(command.faults, ranks, config.parallel.zero_stage, config.training.train_iters)
            check_not_unlearned(command.start, config)
            run_data = open_files(command, world)
            if config.logging.log_dir and not starts_ranks:
                log.also_to_file(Path(config.logging.log_dir) / f"rank_{world.rank}.log")
        exit_signals = parse_exit_signals(command.config.checkpoint.exit_signal)
        if world.launcher != "local":  # those have a parent that passes signals on
            stop_without_launcher(exit_signals[0])
        if starts_ranks:
            log.logger.info("launched as one process on a CPU-only machine; spawning %d local ranks", needed)
            sys.exit(run_local_ranks(needed, [*program_words(verb), *argv], exit_signals))
    except NexusError as error:
        end_refused_rank(error, world)
    if load := command.config.checkpoint.load:
        fresh = "no complete checkpoint yet, starting fresh"
        found = f"continuing from {command.checkpoint}" if command.start else fresh
        if command.start and command.start.has_grown:
            found += ", which an earlier start of this command has grown"
        log.logger.info("--load %s: %s", load, found)
    _train(command, world, run_data)


def _dry_run(command: TrainCommand, world: World) -> NoReturn:
    """Print what the run would be, on rank 0, and end the process. Raises ConfigError."""
    ranks = command.planned_ranks(world.size)
    if not command.search:  # which looks for layouts that can be
        check(command.config, ranks)
    if world.rank == 0:
        with log.Progress("planning"):
            with gc_paused():
                from megatron_nexus.planner.dry_run import report, search_report
            if command.search and command.device is not None:
                lines = search_report(command.config, ranks, command.device)
            else:
                lines = report(command.config, ranks, command.device)
        log.show([*lines, "", *config_text(command.config).rstrip().splitlines()])
    sys.exit(0)


def _train(command: TrainCommand, world: World, run_data: RunData | UnlearningSamples | None) -> NoReturn:
    with importing_torch():
        from megatron_nexus.training.run import train
    start = command.start

    def task() -> None:
        train(
            command.config,
            world,
            command.checkpoint,
            command.argv,
            state_opener(start),
            _open_evaluator,
            command.tokenizer_record,
            run_data,
            command.faults,
            start is not None and start.begins_unlearning,
        )

    run_rank(task, world)


def state_opener(start: Start | None) -> "Callable[[Location], StateReader]":
    """Return what opens the checkpoint of a start: as it is, or grown as --grow says."""
    from megatron_nexus.checkpoint.store import CheckpointReader

    if start is None or start.growth is None:
        return CheckpointReader
    from megatron_nexus.growth.grown_reader import GrownReader
    from megatron_nexus.growth.plan import plan_growth
    from megatron_nexus.growth.report import recipe_lines, warnings

    plan = plan_growth(start.config, start.growth)
    log.show((*warnings(plan, start), *recipe_lines(plan)))
    return partial(GrownReader, plan=plan)


def _open_evaluator(config: RunConfig, tokenizer: Tokenizer) -> "TaskEvaluator":
    """Return what evaluates --eval-tasks. Raises ConfigError or DataError where a task cannot be opened."""
    with log.importing("lm-evaluation-harness"):
        from megatron_nexus.evaluation.harness import make_evaluator
    path, limit = config.logging.eval_task_path, config.logging.eval_tasks_limit
    return make_evaluator(config.logging.task_names, Path(path) if path else None, limit, tokenizer)
