"""Console: what a run logs at its start, when it resumes, and at its end."""

import dataclasses
import shlex
from collections.abc import Mapping

import torch

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import JsonObject, Manifest
from megatron_nexus.config.command_line import model_name
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.rules import config_warnings
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate, next_length, position
from megatron_nexus.log import logger
from megatron_nexus.models.attention_backend import alignment_notes, attention_backend
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.training.corpus import Corpus
from megatron_nexus.training.effective_time import effective_time
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.loop import RunResult, Trainer
from megatron_nexus.training.metrics import METRICS_FILE, plot_losses


def announce_resumed(config: RunConfig, checkpoint: Location, manifest: Manifest) -> None:
    """Log where a run resumes, what changed, and whether it does nothing or has another schedule."""
    for change in changed_settings(manifest.config, config):
        logger.info("changed since the checkpoint: %s", change)
    done, last = manifest.progress, config.training.train_iters
    logger.info("resumed %s at iteration %d, %s samples", checkpoint, done.step, f"{done.samples:,}")
    before = manifest.config["training"]
    assert isinstance(before, Mapping), "a section"
    if done.step >= last:
        logger.info(
            f"nothing is left to train: the checkpoint is at iteration {done.step}, --train-iters is {last}"
        )
    elif last != before["train_iters"] and _decay_follows_run(config):
        logger.info("LR schedule recomputed for %d total iterations", last)


def _decay_follows_run(config: RunConfig) -> bool:
    """Return whether the learning rate depends on --train-iters: it decays, and no flag says until when."""
    _, decay, _ = config.optimizer.lr_spans
    return config.optimizer.lr_decay_style != "constant" and not decay


def changed_settings(saved: JsonObject, config: RunConfig) -> list[str]:
    """Return a line for each field in which this run differs from the one that wrote a checkpoint."""
    changes = []
    for section in ("training", "optimizer", "data"):
        before = saved[section]
        assert isinstance(before, Mapping), f"{section} is not a section"
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            was = before.get(name, value)
            if (tuple(was) if isinstance(was, list) else was) != value:  # JSON has lists for our tuples
                changes.append(f"{flag_of(name)} {value!r}, was {was!r}")
    return changes


def announce(
    config: RunConfig, mesh: Mesh, engine: Engine, rate: float, save: Location, sample_tokens: int
) -> None:
    """Log what runs, on what, in one screen; `rate` is the measured FLOP/s of all ranks."""
    training = config.training
    count = parameter_count(decoder_specs(config.model).values())
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU"
    logger.info("model %s: %s parameters", model_name(config), f"{count:,}")
    threads, steps = torch.get_num_threads(), config.accumulation_steps(mesh.world_size)
    logger.info(
        f"mesh: tensor {mesh.tp_size} x pipeline {mesh.pp_size} x data {mesh.dp_size} on {device}, {threads} "
        f"thread{'s' if threads > 1 else ''} a rank; {training.precision}, ZeRO "
        f"{max(1, config.parallel.zero_stage)}"
        f"{', sequence parallel' if config.parallel.sequence_parallel else ''}"
    )
    logger.info(
        f"kernels: attention {attention_backend(config, mesh.device)}, {config.model.normalization} from "
        f"{training.norm_impl}, {type(engine.optimizer.optimizer).__name__} from "
        f"{config.optimizer.optimizer_impl}"
    )
    logger.info(
        f"batch: {training.global_batch_size} samples of {sample_tokens} tokens in {steps} "
        f"micro-batch{'es' if steps > 1 else ''} a rank; {training.train_iters} iterations"
    )
    if training.rampup_batch_size:
        ramp = config.batches
        logger.info(
            f"batch: from {ramp.start} samples by {ramp.increment} up to {ramp.full} over the first "
            f"{ramp.ramp_samples:,} samples of the run"
        )
    logger.info("measured GEMM throughput: %.1f GFLOP/s over all ranks", rate / 1e9)
    logger.info("saving to %s", save)
    for note in [*config_warnings(config), *alignment_notes(config, mesh.device.type)]:
        logger.info("note: %s", note)


def rate_note(config: RunConfig, step: int) -> str | None:
    """Return what the resume line of a finished run does to the learning rate, where it makes it jump."""
    optimizer, last = config.optimizer, config.training.train_iters
    if step < last or not _decay_follows_run(config):
        return None
    if position(config, step) < optimizer.lr_start_iter + optimizer.lr_spans[0]:
        return None
    ended = learning_rate(optimizer, position(config, step), position(config, last))
    resumed = learning_rate(optimizer, position(config, step + 1), position(config, 2 * step))
    if resumed < 1.01 * ended:
        return None
    samples = optimizer.counts_samples
    keep = f"--lr-decay-{'samples' if samples else 'iters'} {position(config, last)} keeps it"
    new = "" if samples else f", --lr-start-iter {step} begins a new schedule"
    return (
        f"resumed like this, the schedule spans {2 * step} iterations: the learning rate jumps from "
        f"{ended:.2e} to {resumed:.2e}; {keep}{new}"
    )


def resume_command(config: RunConfig, launch: list[str], argv: list[str], folder: Location, step: int) -> str:
    """Return the command that continues a run: as typed, with --load, and more steps if it is finished."""
    finished = step >= config.training.train_iters
    kept: list[str] = []
    words, in_faults = iter(argv), False
    for word in words:
        name = word.split("=")[0]
        in_faults = name == "--inject" or (in_faults and not name.startswith("--"))
        if in_faults:
            continue
        if name in ("--load", "--save", "--grow") or (
            finished and name in ("--train-iters", "--train-tokens", "--train-samples")
        ):
            if "=" not in word:
                next(words, None)
        elif name not in ("--local_rank", "--local-rank", "--reset-optimizer"):
            kept.append(word)
    kept += ["--load", str(folder)]
    if finished:
        kept += ["--train-iters", str(next_length(config, step))]
    return shlex.join([*launch, *kept])


def curve_title(config: RunConfig) -> str:
    """Return what stands above the loss curve of a run."""
    count = parameter_count(decoder_specs(config.model).values())
    return f"{config.preset}, {count / 1e6:.2f}M parameters"


def summarise(
    config: RunConfig,
    trainer: Trainer,
    outcome: RunResult,
    corpus: Corpus,
    launch: list[str],
    argv: list[str],
) -> None:
    """Log what a run has reached, where its files are, and the command that resumes it."""
    folder, run_dir = trainer.checkpoints.folder, trainer.run_dir
    finished = trainer.progress.step >= config.training.train_iters
    count = parameter_count(decoder_specs(config.model).values())
    throughput, entropy = "nothing was trained", ""
    if rate := outcome.tokens_per_s:
        throughput = f"{rate:,.0f} tokens/s, {trainer.throughput.utilization(rate)}"
    if corpus.entropy is not None:
        entropy = f"{corpus.entropy:.4f} nats/token: what a model without context reaches"
    lines = {
        "parameters": f"{count:,} ({model_name(config)})",
        "tokens": f"{trainer.progress.tokens:,} in {trainer.progress.step:,} iterations",
        "throughput": throughput,
        "effective time": str(effective_time(run_dir) or ""),
        **(
            {evaluation.name: str(evaluation) for evaluation in outcome.evaluations}
            or {"validation": "left out: the run was stopped" if corpus.evaluations else "none was asked for"}
        ),
        "tasks": str(outcome.task_scores or ""),
        "unigram entropy": entropy,
        "checkpoint": str(trainer.checkpoints.newest),
        "metrics": str(run_dir / METRICS_FILE),
        "loss curve": str(plot_losses(run_dir, corpus.entropy, curve_title(config))),
        "resume with": resume_command(config, launch, argv, folder, trainer.progress.step),
        "note": rate_note(config, trainer.progress.step) or "",
    }
    logger.info("%s after iteration %d", "finished" if finished else "stopped", trainer.progress.step)
    for name, text in lines.items():
        if text:
            logger.info("  %-16s %s", name, text)
