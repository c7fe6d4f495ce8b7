"""A run on one rank: prepare, build, train, and say at the end what came of it."""

import dataclasses
import shlex
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.manifest import JsonObject, Manifest
from megatron_nexus.checkpoint.run_dir import check_writable
from megatron_nexus.checkpoint.run_lock import run_dir_lock
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.config.command_line import model_name
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.config_file import config_text
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.rules import config_warnings
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import Progress, logger
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.models.nvidia_apex import require_apex
from megatron_nexus.parallel.host_collectives import all_gather_str
from megatron_nexus.parallel.launch_command import launch_words
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import World
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.training.corpus import Corpus, open_corpus
from megatron_nexus.training.deepspeed_adam import build_deepspeed_adam
from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.loop import RunResult, Trainer
from megatron_nexus.training.machine import (
    compile_problem,
    configure_torch,
    gemm_flops_per_s,
    set_environment,
    untested_torch,
)
from megatron_nexus.training.metrics import METRICS_FILE, describe, describe_tasks, plot_losses
from megatron_nexus.training.schedule import learning_rate
from megatron_nexus.training.scoring import TaskEvaluator
from megatron_nexus.training.stop import StopRequest

CONFIG_FILE = "config.yaml"


def run(
    config: RunConfig,
    world: World,
    checkpoint: Location | None,
    argv: list[str],
    open_state: Callable[[Location], StateReader] = CheckpointReader,
    open_evaluator: Callable[[RunConfig, Tokenizer], TaskEvaluator] | None = None,
    record: TokenizerRecord = NO_RECORD,
) -> None:
    """Train as `config` says, from `checkpoint` where there is one; every rank calls this once.

    `argv` is the command line as the user typed it: the summary repeats it to resume. `open_state` reads the
    checkpoint, as a grown one where the run begins so. `open_evaluator` makes who asks for the scores of
    --eval-tasks; only rank 0 calls it. `record` is what the checkpoint keeps of its tokenizer.
    """
    # DeepSpeed calls collectives by names that torch has deprecated; its users cannot mend that.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated")
    parallel = config.parallel
    set_environment(config)
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    configure_torch(config, mesh)
    if mesh.rank == 0 and (warning := untested_torch(torch.__version__)):
        logger.warning("%s", warning)
    _check_device(config, mesh)
    _prepare_kernels(config, mesh)
    _require_one_start(mesh, checkpoint)
    save = _save_folder(config, mesh, checkpoint)
    run_dir = _run_dir(save)
    # Before anything is made: ranks that find their data wrong do not all find it at the same moment.
    corpus = open_corpus(config, mesh, world.local_rank, record)
    evaluator = None
    if config.logging.eval_tasks and mesh.rank == 0:
        assert open_evaluator is not None and corpus.tokenizer is not None, "the rules ask for a tokenizer"
        evaluator = open_evaluator(config, corpus.tokenizer)
    with run_dir_lock(run_dir) if mesh.rank == 0 else nullcontext():
        if mesh.rank == 0:
            # A grown model is another run than the checkpoint's.
            check_writable(save, None if config.checkpoint.grow else checkpoint)
        rate = gemm_flops_per_s(mesh, config.training.precision)
        with Progress("building the model"):
            import_muon_uncompiled()
            engine = Engine(config, mesh, init_weights=checkpoint is None)
        trainer = Trainer(config, mesh, engine, corpus, save, run_dir, rate, evaluator)
        _announce(config, mesh, engine, rate, save)
        if checkpoint is not None:
            with Progress(f"loading {checkpoint}"):
                manifest = trainer.resume(checkpoint, open_state)
            for change in changed_settings(manifest.config, config):
                logger.info("changed since the checkpoint: %s", change)
            done = trainer.progress
            logger.info("resumed %s at iteration %d, %s samples", checkpoint, done.step, f"{done.samples:,}")
            _tell_what_is_left(config, manifest, done.step)
        if mesh.rank == 0:
            (run_dir / CONFIG_FILE).write_text(config_text(config))
        stop = StopRequest(parse_exit_signals(config.checkpoint.exit_signal))
        dist.barrier(mesh.control)  # from here on a signal is heeded by all ranks or by none
        outcome = trainer.fit(stop)
        if mesh.rank == 0:
            _summarise(config, trainer, outcome, corpus, world, argv)
    dist.barrier(mesh.control)
    close_mesh()


def _tell_what_is_left(config: RunConfig, manifest: Manifest, step: int) -> None:
    """Say where a resumed run does nothing, or trains on under another schedule."""
    last = config.training.train_iters
    before = manifest.config["training"]
    assert isinstance(before, Mapping), "a section"
    if step >= last:
        logger.info(
            "nothing is left to train: the checkpoint is at iteration %d, --train-iters is %d", step, last
        )
    elif last != before["train_iters"] and _decay_follows_run(config):
        logger.info("LR schedule recomputed for %d total iterations", last)


def _decay_follows_run(config: RunConfig) -> bool:
    """Return whether the learning rate depends on --train-iters: it decays, and no flag says until when."""
    _, decay, _ = config.optimizer.lr_spans
    return config.optimizer.lr_decay_style != "constant" and not decay


def changed_settings(saved: JsonObject, config: RunConfig) -> list[str]:
    """How this run trains otherwise than the one that wrote a checkpoint, a line for each field.

    What no flag changes is as the checkpoint has it.
    """
    changes = []
    for section in ("training", "optimizer", "data"):
        before = saved[section]
        assert isinstance(before, Mapping), f"{section} is not a section"
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            was = before.get(name, value)
            if (tuple(was) if isinstance(was, list) else was) != value:  # JSON has lists for our tuples
                changes.append(f"{flag_of(name)} {value!r}, was {was!r}")
    return changes


def _require_one_start(mesh: Mesh, checkpoint: Location | None) -> None:
    """Raise CheckpointError where ranks found different checkpoints, as on disks that they do not share."""
    found = all_gather_str(mesh, str(checkpoint or "no checkpoint"))
    if len(set(found)) > 1:
        listed = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(found))
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
    chosen = [folder]
    dist.broadcast_object_list(chosen, src=0, group=mesh.control)
    return chosen[0]


def _run_dir(save: Location) -> Path:
    """Where a run's configuration, metrics and lock lie: beside its checkpoints, or on this disk."""
    return save if isinstance(save, Path) else Path("runs") / save.key.replace("/", "-")


def _announce(config: RunConfig, mesh: Mesh, engine: Engine, rate: float, save: Location) -> None:
    """What runs, on what, in one screen."""
    training = config.training
    count = parameter_count(decoder_specs(config.model).values())
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU"
    logger.info("model %s: %s parameters", model_name(config), f"{count:,}")
    logger.info(
        "mesh: tensor %d x pipeline %d x data %d on %s, %d thread%s a rank; %s, ZeRO %d%s",
        mesh.tp_size,
        mesh.pp_size,
        mesh.dp_size,
        device,
        torch.get_num_threads(),
        "s" if torch.get_num_threads() > 1 else "",
        training.precision,
        max(1, config.parallel.zero_stage),
        ", sequence parallel" if config.parallel.sequence_parallel else "",
    )
    logger.info(
        "kernels: %s of %s, AdamW of %s (%s)",
        config.model.normalization,
        training.norm_impl,
        config.optimizer.optimizer_impl,
        type(engine.optimizer.optimizer).__name__,
    )
    logger.info(
        "batch: %d samples of %d tokens in %d micro-batches a rank; %d iterations",
        training.global_batch_size,
        training.seq_length,
        config.accumulation_steps(mesh.world_size),
        training.train_iters,
    )
    if training.rampup_batch_size:
        ramp = config.batches
        logger.info(
            "batch: from %d samples by %d up to %d over the first %s samples of the run",
            ramp.start,
            ramp.increment,
            ramp.full,
            f"{ramp.ramp_samples:,}",
        )
    logger.info("measured GEMM throughput: %.1f GFLOP/s over all ranks", rate / 1e9)
    logger.info("saving to %s", save)
    for note in config_warnings(config):
        logger.info("note: %s", note)


def rate_note(config: RunConfig, step: int) -> str | None:
    """Return what the resume line of a finished run does to the learning rate, where it makes it jump."""
    optimizer, batches, last = config.optimizer, config.batches, config.training.train_iters
    if step < last or not _decay_follows_run(config):
        return None
    samples = optimizer.counts_samples

    def position(iterations: int) -> int:
        return batches.samples(0, iterations) if samples else iterations

    if position(step) < optimizer.lr_start_iter + optimizer.lr_spans[0]:
        return None
    ended = learning_rate(optimizer, position(step), position(last))
    resumed = learning_rate(optimizer, position(step + 1), position(2 * step))
    if resumed < 1.01 * ended:
        return None
    keep = f"--lr-decay-{'samples' if samples else 'iters'} {position(last)} keeps it"
    anew = "" if samples else f", --lr-start-iter {step} begins a schedule anew"
    return (
        f"resumed so, the schedule spans {2 * step} iterations: the learning rate jumps from {ended:.2e} to "
        f"{resumed:.2e}; {keep}{anew}"
    )


def resume_command(config: RunConfig, launch: list[str], argv: list[str], folder: Location, step: int) -> str:
    """The command line that continues a run: as typed, with --load, and more steps where it is finished."""
    finished = step >= config.training.train_iters
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.split("=")[0]
        if name in ("--load", "--save", "--grow") or (
            finished and name in ("--train-iters", "--train-tokens", "--train-samples")
        ):
            if "=" not in word:
                next(words, None)
        elif name not in ("--local_rank", "--local-rank", "--reset-optimizer"):
            kept.append(word)
    kept += ["--load", str(folder)]
    if finished:
        kept += ["--train-iters", str(2 * max(config.training.train_iters, step))]
    return shlex.join([*launch, *kept])


def _summarise(
    config: RunConfig,
    trainer: Trainer,
    outcome: RunResult,
    corpus: Corpus,
    world: World,
    argv: list[str],
) -> None:
    folder, run_dir = trainer.save_folder, trainer.run_dir
    finished = outcome.progress.step >= config.training.train_iters
    count = parameter_count(decoder_specs(config.model).values())
    lines = {
        "parameters": f"{count:,} (true count of {model_name(config)})",
        "tokens": f"{outcome.progress.tokens:,} in {outcome.progress.step:,} iterations",
        "throughput": f"{outcome.tokens_per_s:,.0f} tokens/s, {trainer.utilization(outcome.tokens_per_s)}"
        if outcome.tokens_per_s
        else "nothing was trained",
        **(
            {evaluation.name: describe(evaluation) for evaluation in outcome.evaluations}
            or {"validation": "left out: the run was stopped" if corpus.evaluations else "none was asked for"}
        ),
        **({"tasks": describe_tasks(outcome.task_scores)} if outcome.task_scores else {}),
        "unigram entropy": f"{corpus.entropy:.4f} nats/token: what a model without context reaches",
        "checkpoint": str(outcome.checkpoint),
        "metrics": str(run_dir / METRICS_FILE),
        "loss curve": str(
            plot_losses(run_dir, corpus.entropy, f"{config.preset}, {count / 1e6:.2f}M parameters")
        ),
        "resume with": resume_command(config, launch_words(world, argv), argv, folder, outcome.progress.step),
    }
    if note := rate_note(config, outcome.progress.step):
        lines["note"] = note
    logger.info("%s after iteration %d", "finished" if finished else "stopped", outcome.progress.step)
    for name, text in lines.items():
        logger.info("  %-16s %s", name, text)
