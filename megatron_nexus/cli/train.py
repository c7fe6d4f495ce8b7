"""The verbs `train` and `unlearn`, from the command line to a run: read, check, start ranks, train.

torch and DeepSpeed are imported only by the ranks that train, after the checks: a wrong flag is answered
at once. `training.run` continues from here.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_nexus import log
from megatron_nexus.base.gc_paused import gc_paused
from megatron_nexus.base.invocation import program_words
from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.run_dir import check_save_folder
from megatron_nexus.cli.train_command import Start, TrainCommand, read_train_command
from megatron_nexus.cli.unlearn_start import check_not_unlearned
from megatron_nexus.config.config_file import config_text
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.injection import check_faults
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import RunData, tokenizer_path, training_sources
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.unlearning_samples import UnlearningSamples, read_unlearning_samples
from megatron_nexus.errors import (
    EXIT_CODE_USER_ERROR,
    ConfigError,
    DataError,
    NexusError,
    RefusedError,
    path_errors,
)
from megatron_nexus.evaluation.task_files import require_tasks
from megatron_nexus.parallel.collective_failure import describe_collective_failure
from megatron_nexus.parallel.launcher_watch import stop_without_launcher
from megatron_nexus.parallel.local_ranks import missing_ranks, run_local_ranks
from megatron_nexus.parallel.world import World, read_world

if TYPE_CHECKING:
    from megatron_nexus.checkpoint.store import StateReader
    from megatron_nexus.evaluation.in_training import InTrainingEvaluator

PEER_EXIT_GRACE_S = 3.0


def run(argv: list[str], verb: str = "train") -> NoReturn:
    """Run `nexus train`, or another verb that trains, with the flags `argv` and end the process."""
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


def end_refused_rank(error: NexusError, world: World | None) -> NoReturn:
    """End the process of a rank that has found a mistake of the user before torch is imported.

    `world` None: it could not be read. Every rank finds the same, and one on each machine says it. Ranks of
    other machines, which may find nothing wrong, are informed that this one was refused.
    """
    if world is None or world.local_rank == 0:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    else:
        # The first to leave has its launcher end the others, perhaps before that one has spoken.
        time.sleep(PEER_EXIT_GRACE_S)
    if world is not None and world.size > world.local_size:
        with gc_paused():
            from megatron_nexus.parallel.rendezvous import refuse
        refuse(world, str(error))
    sys.exit(EXIT_CODE_USER_ERROR)


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
        for line in [*lines, "", *config_text(command.config).rstrip().splitlines()]:
            log.logger.info("%s", line)
    sys.exit(0)


def open_files(command: TrainCommand, world: World) -> RunData | UnlearningSamples | None:
    """Open the data that a run reads, and check the folder it will write, before torch is imported.

    Returns None where it reads the built-in corpus, which is prepared later. Raises ConfigError, DataError.
    """
    config = command.config
    run_data: RunData | UnlearningSamples | None = None
    if world.rank == 0 and config.logging.eval_tasks:
        folder = config.logging.eval_task_path
        require_tasks(config.logging.task_names, Path(folder) if folder else None)
    sources = training_sources(config.data)
    if config.unlearning.is_on:
        run_data = read_unlearning_samples(config, command.tokenizer_record)
        assert command.start is not None, "unlearn has --load"
        if (
            not command.start.begins_unlearning
            and command.start.manifest.data.fingerprint != run_data.fingerprint
        ):
            raise DataError(
                f"--forget {config.unlearning.forget} or --retain {config.unlearning.retain}: not the "
                f"samples, --seed or --seq-length that {command.checkpoint} was unlearned with: give "
                "those, or begin another run with another --save"
            )
    elif sources:
        run_data = RunData(config, sources, tokenizer_path(config.data))
    elif tokenizer_path(config.data) is not None:
        find_tokenizer(config, command.tokenizer_record)
    elif command.start and not command.tokenizer_record.fingerprint:
        raise DataError(
            f"{command.checkpoint} knows no tokenizer, and the ids of the built-in corpus would mean "
            "something else to its model: give the tokenizer that it was trained with as --tokenizer-model, "
            "or token files of that as --data-path"
        )
    # On each machine: launchers of other machines would wait for a rank 0 that was refused.
    if world.local_rank == 0 and config.checkpoint.save:
        # A grown model is another run than the checkpoint's, and so is one that begins to unlearn.
        save, grow = location(config.checkpoint.save), config.checkpoint.grow
        if grow and command.checkpoint and save.resolve() == command.checkpoint.parent.resolve():
            raise ConfigError(f"--save {save} is the run that --grow enlarges: give another --save")
        begins = grow or (command.start and command.start.begins_unlearning)
        check_save_folder(save, None if begins else command.checkpoint)
    return run_data


def _train(command: TrainCommand, world: World, run_data: RunData | UnlearningSamples | None) -> NoReturn:
    """Train, and end this rank so that of all ranks only the first to fail says why."""
    # A rank that loses a peer says so itself; c10d would add the frames of its C++ stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with log.Progress("importing torch and DeepSpeed"), gc_paused():
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns, on each rank
        import torch._dynamo  # which torch itself does at the first optimizer

        from megatron_nexus.training.run import run as train
    try:
        with path_errors():
            train(
                command.config,
                world,
                command.checkpoint,
                command.argv,
                state_opener(command.start),
                _open_evaluator,
                command.tokenizer_record,
                run_data,
                command.faults,
                command.start is not None and command.start.begins_unlearning,
            )
    except BaseException as error:  # noqa: BLE001 - every way to fail ends here, and the process with it
        end_failed_rank(error, world)
    # Libraries finish at exit what they hold, as the wandb monitor of DeepSpeed does.
    sys.exit(0)


def state_opener(start: Start | None) -> "Callable[[Location], StateReader]":
    """Return what opens the checkpoint of a start: as it is, or grown as --grow says."""
    from megatron_nexus.checkpoint.store import CheckpointReader

    if start is None or start.growth is None:
        return CheckpointReader
    from megatron_nexus.growth.grown_reader import GrownReader
    from megatron_nexus.growth.plan import plan_growth
    from megatron_nexus.growth.report import recipe_lines, warnings

    plan = plan_growth(start.config, start.growth)
    for line in (*warnings(plan, start), *recipe_lines(plan)):
        log.logger.info("%s", line)
    return partial(GrownReader, plan=plan)


def end_failed_rank(error: BaseException, world: World) -> NoReturn:
    """End the process of a rank that has failed, which says why if it is the first of all to fail."""
    from megatron_nexus.parallel.mesh import first_failure

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_first, code = first_failure(error.exit_code if isinstance(error, NexusError) else 1)
    # srun ends the others when one has left, and gives the highest code of all: 143 would hide this one.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    if isinstance(error, RefusedError) and world.local_rank:
        is_first = False  # one on each machine says it
    if is_first:
        _report(error, world.rank)
    else:
        # The launcher is about to end this rank; leaving first would hide the exit code that matters.
        time.sleep(PEER_EXIT_GRACE_S)
    # Not sys.exit: other ranks may never answer again, and the interpreter would wait for them.
    sys.stdout.flush()
    os._exit(code)


def _open_evaluator(config: RunConfig, tokenizer: Tokenizer) -> "InTrainingEvaluator":
    """Return what evaluates --eval-tasks. Raises ConfigError or DataError where a task cannot be opened."""
    with log.importing("lm-evaluation-harness"):
        from megatron_nexus.evaluation.in_training import InTrainingEvaluator
    path, limit = config.logging.eval_task_path, config.logging.eval_tasks_limit
    return InTrainingEvaluator(config.logging.task_names, Path(path) if path else None, limit, tokenizer)


def _report(error: BaseException, rank: int) -> None:
    """Write why this rank fails to stderr."""
    if isinstance(error, NexusError):
        log.error(f"{type(error).__name__}: {error}")
    elif failed := describe_collective_failure(error, rank):
        log.error(failed)
    else:
        log.error(f"rank {rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
