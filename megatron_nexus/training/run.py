"""A run on one rank in four phases: the ranks, the data, the model, the training."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.run_dir import check_writable, checkpoint_before, run_dir_lock
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.config.config_file import CONFIG_FILE, config_text
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.injection import InjectedFault
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import RunData
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.data.unlearning_samples import UnlearningSamples, read_unlearning_samples
from megatron_nexus.errors import DamagedCheckpointError
from megatron_nexus.log import Progress, logger
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.parallel.launch_command import launch_words
from megatron_nexus.parallel.mesh import Mesh, close_mesh
from megatron_nexus.parallel.rank_watch import RankWatch
from megatron_nexus.parallel.world import World
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.answer_scorer import open_reference
from megatron_nexus.training.console import announce, announce_resumed, curve_title, summarise
from megatron_nexus.training.corpus import Corpus, open_answers, open_corpus
from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.fault_injection import FaultInjector
from megatron_nexus.training.faults import STOP_FILE, StopRequest
from megatron_nexus.training.grown_elements import grown_elements
from megatron_nexus.training.growth_metrics import GrowthMetricsHook
from megatron_nexus.training.hooks import Hook, telling_of_failures
from megatron_nexus.training.loop import Trainer
from megatron_nexus.training.loss_plot import LossPlot
from megatron_nexus.training.machine import gemm_flops_per_s, set_trace_prefix
from megatron_nexus.training.recorder import finish_loggers
from megatron_nexus.training.run_times import RunTimes, log_command
from megatron_nexus.training.scoring import TaskEvaluator
from megatron_nexus.training.start_ranks import start_ranks
from megatron_nexus.training.torch_errors import explaining_damaged_libraries, explaining_memory_errors

_BEFORE_TIMEOUT = 0.95
"""Share of torch's time-out at which ranks that hang are named: it counts from a collective's start."""


def train(
    config: RunConfig,
    world: World,
    checkpoint: Location | None,
    argv: list[str],
    open_state: Callable[[Location], StateReader] = CheckpointReader,
    open_evaluator: Callable[[RunConfig, Tokenizer], TaskEvaluator] | None = None,
    record: TokenizerRecord = NO_RECORD,
    run_data: RunData | UnlearningSamples | None = None,
    faults: Sequence[InjectedFault] = (),
    begins_unlearning: bool = False,
) -> None:
    """Train as `config` says, from `checkpoint` where there is one; every rank calls this once.

    `argv` is the command line as the user typed it: the summary repeats it to resume. `open_state` reads the
    checkpoint, as a grown one where the run begins so. `open_evaluator` makes what evaluates --eval-tasks.
    `record` is what the checkpoint keeps of its tokenizer. `run_data` is what the run reads, where it is open
    already. `faults` are those of --inject. `begins_unlearning`: at the weights of another run's checkpoint.
    """
    # 1. The ranks, and what they agree on.
    mesh = start_ranks(config, world, checkpoint)
    save = _save_folder(config, mesh, checkpoint)
    run_dir = _run_dir(save)
    set_trace_prefix(run_dir)
    # 2. The data. Before the model: ranks that find their data wrong do not all find it at the same moment.
    corpus = _open_data(config, world, mesh, record, run_data)
    evaluator = _open_evaluator(config, corpus, open_evaluator) if mesh.rank == 0 else None
    hooks, beacon = list[Hook](), Beacon()
    watch = _start_watch(config, world, mesh, beacon, run_dir, hooks)
    with (
        run_dir_lock(run_dir) if mesh.rank == 0 else nullcontext(),
        telling_of_failures(hooks, beacon),
        watch.naming_lost_ranks(),
        explaining_memory_errors(config, mesh.rank, mesh.dp_size, mesh.device, beacon),
        explaining_damaged_libraries(mesh.rank) if config.training.compile else nullcontext(),
    ):
        # 3. The model and its optimizer, new or from the checkpoint; a grown model is another run than that.
        if mesh.rank == 0:
            check_writable(save, None if config.checkpoint.grow or begins_unlearning else checkpoint)
        times = RunTimes(run_dir, mesh.rank == 0)
        rate = gemm_flops_per_s(mesh, config.training.precision)
        with Progress("building the model"):
            import_muon_uncompiled()
            engine = Engine(config, mesh, checkpoint is None, beacon)
        trainer = Trainer(config, mesh, engine, corpus, save, run_dir, rate, evaluator, beacon, times, hooks)
        announce(config, mesh, engine, rate, save, corpus.sample_tokens(config))
        if checkpoint is not None:
            _resume(trainer, checkpoint, open_state, begins_unlearning)
        if isinstance(corpus.training, AnswerBatches):
            open_reference(config, mesh, engine, corpus.training, run_dir, begins_unlearning)
        launch = launch_words(world, argv, config.verb)
        _add_hooks(trainer, [*launch, *argv], faults)
        # 4. The training.
        result = trainer.fit(_stop_request(config, mesh, run_dir))
        if mesh.rank == 0:
            summarise(config, trainer, result, corpus, launch, argv)
        mesh.control.barrier()
        watch.end()
        mesh.control.barrier()  # nobody watches, and ranks may leave
    close_mesh()


def _open_data(
    config: RunConfig,
    world: World,
    mesh: Mesh,
    record: TokenizerRecord,
    run_data: RunData | UnlearningSamples | None,
) -> Corpus:
    """Return what the run reads; a collective call. Raises DataError."""
    if config.unlearning.is_on and run_data is None:
        run_data = read_unlearning_samples(config, record)
    if isinstance(run_data, UnlearningSamples):
        return open_answers(run_data, mesh, record)
    return open_corpus(config, mesh, world.local_rank, record, run_data)


def _open_evaluator(
    config: RunConfig,
    corpus: Corpus,
    open_evaluator: Callable[[RunConfig, Tokenizer], TaskEvaluator] | None,
) -> TaskEvaluator | None:
    """Return what evaluates --eval-tasks, None where there are none. Raises ConfigError, DataError."""
    if not config.logging.eval_tasks:
        return None
    assert open_evaluator is not None and corpus.tokenizer is not None, "the rules ask for a tokenizer"
    return open_evaluator(config, corpus.tokenizer)


def _add_hooks(trainer: Trainer, command: Sequence[str], faults: Sequence[InjectedFault]) -> None:
    """Record in the run's folder what trains, and add what draws, measures and injects; a collective call."""
    config, mesh, corpus, run_dir = trainer.config, trainer.mesh, trainer.corpus, trainer.run_dir
    step = trainer.progress.step
    if mesh.rank == 0:
        trainer.hooks.append(LossPlot(run_dir, corpus.entropy, curve_title(config)))
        (run_dir / CONFIG_FILE).write_text(config_text(config))
        log_command(run_dir, command, step)
    if config.logging.growth_metrics_interval:
        elements = grown_elements(config.model, trainer.lineage)
        trainer.hooks.append(
            GrowthMetricsHook(config, mesh, trainer.engine, corpus.training, elements, trainer.hooks, step)
        )
    trainer.injector = FaultInjector(faults, mesh.rank, run_dir, trainer.engine.parameters)


def _stop_request(config: RunConfig, mesh: Mesh, run_dir: Path) -> StopRequest:
    """Return what notes a signal, from now on on all ranks; a collective call."""
    stop = StopRequest(
        parse_exit_signals(config.checkpoint.exit_signal),
        config.checkpoint.exit_duration_in_mins,
        run_dir / STOP_FILE if mesh.rank == 0 else None,
    )
    mesh.control.barrier()
    return stop


def _resume(
    trainer: Trainer, checkpoint: Location, open_state: Callable[[Location], StateReader], begins: bool
) -> None:
    """Continue from a checkpoint or, where a byte of it is wrong, from the one before; a collective call.

    Where the user has named a checkpoint, not a run, that one alone counts. Raises CheckpointError.
    """
    config = trainer.config.checkpoint
    may_go_back = not config.grow and (config.load == "auto" or location(config.load) != checkpoint)
    while True:
        try:
            with Progress(f"loading {checkpoint}"):
                manifest = trainer.resume(checkpoint, open_state, begins)
            break
        except DamagedCheckpointError as error:
            before = checkpoint_before(checkpoint) if may_go_back else None
            if before is None:
                raise
            if trainer.mesh.rank == 0:
                logger.warning("WARNING: going back to %s, the checkpoint before: %s", before, error)
            checkpoint = before
    if begins:
        logger.info("unlearning begins at the weights of %s", checkpoint)
    else:
        announce_resumed(trainer.config, checkpoint, manifest)


def _start_watch(
    config: RunConfig, world: World, mesh: Mesh, beacon: Beacon, run_dir: Path, hooks: Sequence[Hook]
) -> RankWatch:
    """Watch for ranks that hang, before NCCL's own time-out ends their processes; a collective call."""
    parallel = config.parallel
    longest_s = 60.0 * parallel.distributed_timeout_minutes
    step_s = parallel.distributed_timeout_seconds_after_init or longest_s
    watch = RankWatch(
        world,
        mesh.control,
        beacon,
        min(parallel.rank_heartbeat_timeout, _BEFORE_TIMEOUT * step_s),
        _BEFORE_TIMEOUT * longest_s,
        run_dir,
        by_phase=mesh.pp_size > 1,
    )
    watch.on_leave = partial(finish_loggers, hooks)
    return watch


def _save_folder(config: RunConfig, mesh: Mesh, checkpoint: Location | None) -> Location:
    """Where this run saves, decided by rank 0; a collective call."""
    folder: Location
    if config.checkpoint.save:
        folder = location(config.checkpoint.save)
    elif checkpoint is not None and not config.checkpoint.grow:
        folder = checkpoint.parent
    else:
        folder = Path(f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    return location(mesh.control.broadcast_str(str(folder)))


def _run_dir(save: Location) -> Path:
    """Where a run's configuration, metrics and lock lie: next to its checkpoints, or on this disk."""
    return save if isinstance(save, Path) else Path("runs") / save.key.replace("/", "-")
