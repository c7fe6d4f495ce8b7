"""The verb `train`: configuration, checks, ranks, and how a run ends.

torch and DeepSpeed are imported only by the ranks that train, after the checks: a wrong flag is answered
at once.
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
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import check_save_folder, find_checkpoint, newest_checkpoint
from megatron_nexus.checkpoint.saved_config import saved_config
from megatron_nexus.cli.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.config.command_line import Consumed, build, given_flags, merge_settings
from megatron_nexus.config.config_file import config_text, read_config_file
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.presets import DEFAULT_PRESET, Value
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import RunData, tokenizer_path, training_sources
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.tokenizer_record import NO_RECORD
from megatron_nexus.errors import (
    EXIT_CODE_USER_ERROR,
    ConfigError,
    DataError,
    NexusError,
    path_errors,
)
from megatron_nexus.evaluation.task_files import require_tasks
from megatron_nexus.growth.request import grown_config, read_request
from megatron_nexus.parallel.launcher_watch import stop_without_launcher
from megatron_nexus.parallel.local_ranks import missing_ranks, run_local_ranks
from megatron_nexus.parallel.world import World, read_world

if TYPE_CHECKING:
    from megatron_nexus.evaluation.in_training import InTrainingEvaluator

PEER_EXIT_GRACE_S = 3.0


def run(argv: list[str]) -> NoReturn:
    """Run `nexus train` with the flags `argv` and end the process."""
    speaks = True
    try:
        world = read_world(os.environ)
        speaks = world.local_rank == 0
        log.configure(speaks=world.rank == 0)
        if world.rank and {"-h", "--help", "--version"}.intersection(argv):
            sys.exit(0)  # rank 0 tells it
        with path_errors():
            config, checkpoint = configure(argv)
            wanted = config.model_parallel_size
            planned = planned_world_size(argv, world, wanted)
            if planned is not None:
                check(config, planned)
                _dry_run(config, planned, speaks=world.rank == 0)
            check(config, wanted if missing_ranks(world, wanted) else world.size)
            preflight(config, checkpoint, world)
        exit_signals = parse_exit_signals(config.checkpoint.exit_signal)
        if world.launcher != "local":  # those have a parent that passes signals on
            stop_without_launcher(exit_signals[0])
        if missing_ranks(world, wanted):
            log.logger.info("one process was started on a machine of CPUs: starting %d local ranks", wanted)
            sys.exit(run_local_ranks(wanted, [*program_words("train"), *argv], exit_signals))
        if config.checkpoint.load:
            found = (
                f"continuing from {checkpoint}"
                if checkpoint
                else "no complete checkpoint yet, starting fresh"
            )
            log.logger.info("--load %s: %s", config.checkpoint.load, found)
    except NexusError as error:
        # Every rank finds the same: one on each machine says it.
        if speaks:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        else:
            # The first to leave has its launcher end the others, perhaps before that one has spoken.
            time.sleep(PEER_EXIT_GRACE_S)
        sys.exit(EXIT_CODE_USER_ERROR)
    _train(config, world, checkpoint, argv)


def configure(argv: list[str]) -> tuple[RunConfig, Location | None]:
    """The configuration of a command line, and the checkpoint it starts from.

    A run that starts from a checkpoint goes on as that was configured where no flag says otherwise.

    Raises:
        ConfigError: flags that are unknown, wrong or contradict the checkpoint.
        CheckpointError: --load names nothing that can be loaded.
    """
    given = given_flags(argv)
    if "config" in given:
        given = merge_settings(read_config_file(Path(str(given["config"]))), given)
    load = str(given.get("load", ""))
    checkpoint = None
    if load:
        checkpoint = _newest_run(given) if load == "auto" else find_checkpoint(location(load))
    grow = str(given.get("grow", ""))
    if "grow" in given and not grow.strip():
        raise ConfigError(["--grow is empty: write such as nexus_m=1088, or drop it"])
    if checkpoint is None:
        if grow:
            raise ConfigError([f"--grow {grow!r} needs a checkpoint to grow: give --load"])
        return build(given), None
    manifest = read_manifest(checkpoint)
    saved, done = saved_config(checkpoint, manifest), manifest.progress
    if grow:
        saved = grown_config(saved, read_request(grow))
    return build(given, saved, Consumed(done.step, done.samples, done.tokens)), checkpoint


def preflight(config: RunConfig, checkpoint: Location | None, world: World) -> None:
    """Look at the files that a run will read and the folder it will write, before torch is imported.

    Raises:
        ConfigError, DataError: as `RunData`, `check_save_folder` and `require_tasks` do.
    """
    if world.rank == 0 and config.logging.eval_tasks:
        folder = config.logging.eval_task_path
        require_tasks(config.logging.task_names, Path(folder) if folder else None)
    sources = training_sources(config.data)
    if sources:
        RunData(config, sources, tokenizer_path(config.data))
    else:
        _check_tokenizer(config, checkpoint)
    if world.rank == 0 and config.checkpoint.save:
        # A grown model is another run than the checkpoint's.
        continued = None if config.checkpoint.grow else checkpoint
        check_save_folder(location(config.checkpoint.save), continued)


def _check_tokenizer(config: RunConfig, checkpoint: Location | None) -> None:
    """Look at the tokenizer in whose tokens the built-in corpus is to be read. Raises DataError."""
    record = tokenizer_record(read_manifest(checkpoint)) if checkpoint is not None else NO_RECORD
    if tokenizer_path(config.data) is not None:
        find_tokenizer(config, record)
    elif checkpoint is not None and not record.fingerprint:
        raise DataError(
            f"{checkpoint} knows no tokenizer, and the ids of the built-in corpus would mean something else "
            "to its model: give the tokenizer that it was trained with as --tokenizer-model, or token files "
            "of that as --data-path"
        )


def planned_world_size(argv: list[str], world: World, model_parallel_size: int) -> int | None:
    """The ranks that --dry-run plans for; None without it.

    As --world-size says, else as many as a launcher has started, else one copy of the model.

    Raises ConfigError on a --world-size that cannot be meant.
    """
    given = given_flags(argv)
    size = given.get("world_size")
    if "dry_run" not in given:
        if size is not None:
            raise ConfigError([f"--world-size {size} belongs to --dry-run: add it, or drop --world-size"])
        return None
    if isinstance(size, int):
        if size < 1:
            raise ConfigError([f"--world-size {size} must be positive: give the number of ranks"])
        return size
    return world.size if world.size > 1 else max(1, model_parallel_size)


def _newest_run(given: dict[str, Value]) -> Location | None:
    """What --load auto means: the newest checkpoint in --save, or without it of the preset's default runs."""
    if "save" in given:
        return newest_checkpoint(location(str(given["save"])))
    runs = sorted(Path("runs").glob(f"{given.get('preset', DEFAULT_PRESET)}-*"), reverse=True)
    return next((found for found in map(newest_checkpoint, runs) if found is not None), None)


def _dry_run(config: RunConfig, world_size: int, speaks: bool) -> NoReturn:
    """Tell what the run would be, on rank 0, and end."""
    if speaks:
        log.logger.info("%s\n", config_text(config).rstrip())
        with log.Progress("planning the memory of each rank"):
            with gc_paused():
                from megatron_nexus.planner.dry_run import report
            lines = report(config, world_size)
        for line in lines:
            log.logger.info("%s", line)
    sys.exit(0)


def _train(config: RunConfig, world: World, checkpoint: Location | None, argv: list[str]) -> NoReturn:
    """Train, and end this rank so that of all ranks only the first to fail says why."""
    # Ranks that lose a peer are told of here; c10d would add the frames of its C++ stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with log.Progress("importing torch and DeepSpeed"), gc_paused():
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns, on each rank
        import torch._dynamo  # which torch itself does at the first optimizer

        from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
        from megatron_nexus.growth.grown_reader import GrownReader
        from megatron_nexus.growth.plan import plan_growth
        from megatron_nexus.parallel.mesh import is_first_failure
        from megatron_nexus.training.run import run as train
    open_state: Callable[[Location], StateReader] = CheckpointReader
    try:
        with path_errors():
            if config.checkpoint.grow and checkpoint is not None:
                saved = saved_config(checkpoint, read_manifest(checkpoint))
                request = read_request(config.checkpoint.grow)
                open_state = partial(GrownReader, plan=plan_growth(saved, request))
            record = tokenizer_record(read_manifest(checkpoint)) if checkpoint else NO_RECORD
            train(config, world, checkpoint, argv, open_state, _open_evaluator, record)
    except BaseException as error:  # noqa: BLE001 - every way to fail ends here, and the process with it
        code = EXIT_CODE_USER_ERROR if isinstance(error, NexusError) else 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if is_first_failure():
            _report(error, world.rank)
        else:
            # The launcher is about to end this rank; leaving first would hide the exit code that matters.
            time.sleep(PEER_EXIT_GRACE_S)
        # Not sys.exit: other ranks may never answer again, and the interpreter would wait for them.
        sys.stdout.flush()
        os._exit(code)
    # Libraries finish at exit what they hold, as the wandb monitor of DeepSpeed does.
    sys.exit(0)


def _open_evaluator(config: RunConfig, tokenizer: Tokenizer) -> "InTrainingEvaluator":
    """Return what evaluates --eval-tasks. Raises ConfigError or DataError where a task cannot be opened."""
    logging = config.logging
    with log.Progress("importing lm-evaluation-harness"):
        from megatron_nexus.evaluation.in_training import InTrainingEvaluator
    folder = Path(logging.eval_task_path) if logging.eval_task_path else None
    return InTrainingEvaluator(logging.task_names, folder, logging.eval_tasks_limit, tokenizer)


def _report(error: BaseException, rank: int) -> None:
    if isinstance(error, NexusError):
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    elif isinstance(error, RuntimeError) and "gloo" in str(error):
        sys.stderr.write(f"rank {rank} lost its connection to another rank, which ended without a word\n")
    else:
        sys.stderr.write(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}")
    sys.stderr.flush()
