"""A run on one rank in four phases: the ranks, the data, the model, the training."""

import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.manifest import GrownRegion, Manifest
from megatron_nexus.checkpoint.run_dir import check_writable, checkpoint_before
from megatron_nexus.checkpoint.run_lock import run_dir_lock
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.config.config_file import CONFIG_FILE, config_text
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.injection import InjectedFault
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import RunData
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.data.unlearning_samples import UnlearningSamples, read_unlearning_samples
from megatron_nexus.errors import CheckpointError, ConfigError, DamagedCheckpointError
from megatron_nexus.log import Progress, logger
from megatron_nexus.models.attention_backend import flex_problem
from megatron_nexus.models.nvidia_apex import require_apex
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.parallel.launch_command import launch_words
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.rank_watch import RankWatch
from megatron_nexus.parallel.world import World
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.answer_scorer import open_reference
from megatron_nexus.training.command_log import log_command
from megatron_nexus.training.console import announce, announce_resumed, curve_title, summarise
from megatron_nexus.training.corpus import open_answers, open_corpus
from megatron_nexus.training.deepspeed_adam import build_deepspeed_adam
from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.fault_injection import FaultInjector
from megatron_nexus.training.faults import STOP_FILE, StopRequest
from megatron_nexus.training.grown_elements import BoxesByGrowth, CopiedRows, grown_elements
from megatron_nexus.training.growth_metrics import GrowthMetricsHook
from megatron_nexus.training.hooks import Hook, telling_of_failures
from megatron_nexus.training.loop import Trainer
from megatron_nexus.training.loss_plot import LossPlot
from megatron_nexus.training.machine import (
    compile_problem,
    configure_torch,
    gemm_flops_per_s,
    set_environment,
    set_trace_prefix,
    untested_torch,
)
from megatron_nexus.training.memory_errors import explaining_memory_errors
from megatron_nexus.training.profiler import require_cuda_for_profile
from megatron_nexus.training.recorder import finish_loggers
from megatron_nexus.training.run_times import RunTimes
from megatron_nexus.training.scoring import TaskEvaluator

_BEFORE_TIMEOUT = 0.95
"""Share of torch's time-out at which ranks that hang are named: it counts from a collective's start."""


def run(
    config: RunConfig,
    world: World,
    checkpoint: Location | None,
    argv: list[str],
    open_state: Callable[[Location], StateReader] = CheckpointReader,
    open_evaluator: Callable[[RunConfig, Tokenizer], TaskEvaluator] | None = None,
    record: TokenizerRecord = NO_RECORD,
    run_data: RunData | UnlearningSamples | None = None,
    newest_regions: Callable[[Manifest], Sequence[GrownRegion]] = lambda manifest: (),
    boxes_by_growth: BoxesByGrowth | None = None,
    copied_rows: CopiedRows | None = None,
    faults: Sequence[InjectedFault] = (),
    begins_unlearning: bool = False,
) -> None:
    """Train as `config` says, from `checkpoint` where there is one; every rank calls this once.

    `argv` is the command line as the user typed it: the summary repeats it to resume. `open_state` reads the
    checkpoint, as a grown one where the run begins so. `open_evaluator` makes what evaluates --eval-tasks;
    only rank 0 calls it. `record` is what the checkpoint keeps of its tokenizer. `run_data` is what the run
    reads, where it is open already. `newest_regions` says what the last growth of a checkpoint added,
    `boxes_by_growth` says it of every growth of a lineage, `copied_rows` what the last one copied, both for
    --growth-metrics-interval. `faults` are those of --inject. `begins_unlearning`: the run begins at the
    weights of `checkpoint`, which is another's.
    """
    # 1. The ranks, and what they agree on.
    mesh = start_ranks(config, world, checkpoint)
    save = _save_folder(config, mesh, checkpoint)
    run_dir = _run_dir(save)
    set_trace_prefix(run_dir)
    # 2. The data. Before the model: ranks that find their data wrong do not all find it at the same moment.
    if config.unlearning.is_on and run_data is None:
        run_data = read_unlearning_samples(config, record)
    if isinstance(run_data, UnlearningSamples):
        corpus = open_answers(run_data, mesh, record)
    else:
        corpus = open_corpus(config, mesh, world.local_rank, record, run_data)
    evaluator = None
    if config.logging.eval_tasks and mesh.rank == 0:
        assert open_evaluator is not None and corpus.tokenizer is not None, "the rules ask for a tokenizer"
        evaluator = open_evaluator(config, corpus.tokenizer)
    beacon = Beacon()
    watch = _start_watch(config, world, mesh, beacon, run_dir)
    hooks: list[Hook] = []
    with (
        run_dir_lock(run_dir) if mesh.rank == 0 else nullcontext(),
        telling_of_failures(hooks, beacon),
        watch.naming_lost_ranks(),
        explaining_memory_errors(config, mesh.rank, mesh.dp_size, mesh.device, beacon),
    ):
        # 3. The model and its optimizer, new or from the checkpoint.
        if mesh.rank == 0:
            # A grown model is another run than the checkpoint's.
            check_writable(save, None if config.checkpoint.grow or begins_unlearning else checkpoint)
        times = RunTimes(run_dir, mesh.rank == 0)
        rate = gemm_flops_per_s(mesh, config.training.precision)
        with Progress("building the model"):
            import_muon_uncompiled()
            engine = Engine(config, mesh, checkpoint is None, beacon)
        trainer = Trainer(config, mesh, engine, corpus, save, run_dir, rate, evaluator, beacon, times, hooks)
        watch.on_leave = partial(finish_loggers, hooks)
        announce(config, mesh, engine, rate, save, corpus.sample_tokens(config))
        if checkpoint is not None:
            resume = partial(
                trainer.resume,
                open_state=open_state,
                newest_regions=newest_regions,
                begins=begins_unlearning,
            )
            manifest, checkpoint = _resume(trainer, checkpoint, resume)
            if begins_unlearning:
                logger.info("unlearning begins at the weights of %s", checkpoint)
            else:
                announce_resumed(config, checkpoint, manifest)
        if isinstance(corpus.training, AnswerBatches):
            open_reference(config, mesh, engine, corpus.training, run_dir, begins_unlearning)
        if mesh.rank == 0:
            hooks.append(LossPlot(run_dir, corpus.entropy, curve_title(config)))
            (run_dir / CONFIG_FILE).write_text(config_text(config))
            log_command(run_dir, [*launch_words(world, argv, config.verb), *argv], trainer.progress.step)
        if config.logging.growth_metrics_interval:
            assert boxes_by_growth is not None and copied_rows is not None, "the verb `train` passes them"
            elements = grown_elements(config.model, trainer.lineage, boxes_by_growth, copied_rows)
            hook = GrowthMetricsHook(
                config, mesh, engine, corpus.training, elements, trainer.hooks, trainer.progress.step
            )
            trainer.hooks.append(hook)
        trainer.injector = FaultInjector(faults, mesh.rank, run_dir, engine.parameters)
        # 4. The training.
        stop = StopRequest(
            parse_exit_signals(config.checkpoint.exit_signal),
            config.checkpoint.exit_duration_in_mins,
            run_dir / STOP_FILE if mesh.rank == 0 else None,
        )
        mesh.control.barrier()  # from here on all ranks handle a signal, or none
        result = trainer.fit(stop)
        if mesh.rank == 0:
            summarise(config, trainer, result, corpus, launch_words(world, argv, config.verb), argv)
        mesh.control.barrier()
        watch.end()
        mesh.control.barrier()  # nobody watches, and ranks may leave
    close_mesh()


def _resume(
    trainer: Trainer, checkpoint: Location, resume: Callable[[Location], Manifest]
) -> tuple[Manifest, Location]:
    """Continue from a checkpoint or, where a byte of it is wrong, from the one before; a collective call.

    Where the user has named a checkpoint, not a run, that one alone counts. Raises CheckpointError.
    """
    config = trainer.config.checkpoint
    may_go_back = not config.grow and (config.load == "auto" or location(config.load) != checkpoint)
    while True:
        try:
            with Progress(f"loading {checkpoint}"):
                return resume(checkpoint), checkpoint
        except DamagedCheckpointError as error:
            before = checkpoint_before(checkpoint) if may_go_back else None
            if before is None:
                raise
            if trainer.mesh.rank == 0:
                logger.warning("WARNING: going back to %s, the checkpoint before: %s", before, error)
            checkpoint = before


def _start_watch(config: RunConfig, world: World, mesh: Mesh, beacon: Beacon, run_dir: Path) -> RankWatch:
    """Watch for ranks that hang, before NCCL's own time-out ends their processes; a collective call."""
    parallel = config.parallel
    longest_s = 60.0 * parallel.distributed_timeout_minutes
    step_s = parallel.distributed_timeout_seconds_after_init or longest_s
    return RankWatch(
        world,
        mesh.control,
        beacon,
        min(parallel.rank_heartbeat_timeout, _BEFORE_TIMEOUT * step_s),
        _BEFORE_TIMEOUT * longest_s,
        run_dir,
        by_phase=mesh.pp_size > 1,
    )


def start_ranks(config: RunConfig, world: World, checkpoint: Location | None) -> Mesh:
    """Start torch.distributed, and check that this machine can do what the configuration asks for."""
    # DeepSpeed calls collectives by names that torch has deprecated; its users cannot fix that.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated")
    parallel = config.parallel
    set_environment(config)
    mesh = make_mesh(
        world,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        60.0 * parallel.distributed_timeout_minutes,
        by_node=parallel.hierarchical_grad_reduce,
    )
    configure_torch(config, mesh)
    if mesh.rank == 0 and (warning := untested_torch(torch.__version__)):
        logger.warning("%s", warning)
    _check_device(config, mesh)
    require_cuda_for_profile(config, mesh.device.type)
    _prepare_kernels(config, mesh)
    _require_one_start(mesh, checkpoint)
    return mesh


def _require_one_start(mesh: Mesh, checkpoint: Location | None) -> None:
    """Raise CheckpointError where ranks found different checkpoints, as on disks that they do not share."""
    found = mesh.control.distinct_str(str(checkpoint or "no checkpoint"))
    if len(found) > 1:
        listed = "; ".join(f"rank {rank}: {name}" for name, rank in found.items())
        raise CheckpointError(
            f"--load means different checkpoints ({listed}): use a disk that all ranks share"
        )


def _check_device(config: RunConfig, mesh: Mesh) -> None:
    if (
        config.training.precision == "bf16"
        and mesh.device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(mesh.device)
        raise ConfigError([f"--bf16: {name} on {socket.gethostname()} has no bf16: use --fp32"])


def _prepare_kernels(config: RunConfig, mesh: Mesh) -> None:
    """Have the chosen implementations at hand, or raise ConfigError; a collective call."""
    if config.training.compile and (problem := compile_problem(config, torch.__version__, mesh.device.type)):
        raise ConfigError([problem])
    if problem := flex_problem(config, mesh.device.type):
        raise ConfigError([problem])
    chosen = {"--norm-impl": config.training.norm_impl, "--optimizer-impl": config.optimizer.optimizer_impl}
    require_apex([flag for flag, choice in chosen.items() if choice == "apex"], mesh.device)
    if config.optimizer.optimizer_impl == "deepspeed":
        build_deepspeed_adam(mesh)


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
