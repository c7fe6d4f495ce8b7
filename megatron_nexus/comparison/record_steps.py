"""Record steps: trains a few steps on one rank, and records what goes through its layers.

A run as `training.run` makes it, up to its first step, with the same ranks, data, engine and checkpoint; it
saves, validates and logs nothing.
"""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.base.durable import size_in_words
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.comparison.recording import Place, RecordedRun, RecordingWriter, finish_recording
from megatron_nexus.comparison.tensor_recorder import TensorRecorder
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate
from megatron_nexus.data.run_data import RunData
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.errors import ConfigError
from megatron_nexus.log import logger
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.models.eager import eager
from megatron_nexus.parallel.mesh import Mesh, close_mesh
from megatron_nexus.parallel.world import World
from megatron_nexus.training.corpus import open_corpus
from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.loop import Trainer
from megatron_nexus.training.start_ranks import start_ranks


@dataclass(frozen=True)
class RecordSettings:
    """What to record: where to, how many steps, activations of how many samples, in which type."""

    folder: Path
    steps: int
    samples: int
    float64: bool


def record_steps(
    config: RunConfig,
    world: World,
    checkpoint: Location | None,
    settings: RecordSettings,
    record: TokenizerRecord = NO_RECORD,
    run_data: RunData | None = None,
    open_state: Callable[[Location], StateReader] = CheckpointReader,
) -> None:
    """Train the first steps of a run, and record them; every rank calls this once.

    The arguments are those of `training.run.train`.
    """
    mesh = start_ranks(config, world, checkpoint)
    corpus = open_corpus(config, mesh, world.local_rank, record, run_data)
    import_muon_uncompiled()
    engine = Engine(config, mesh, checkpoint is None, float64=settings.float64)
    trainer = Trainer(config, mesh, engine, corpus, settings.folder, settings.folder, 1.0)
    if checkpoint is not None:
        trainer.resume(checkpoint, open_state)
    place = Place(mesh.rank, mesh.pp_rank, mesh.dp_rank, mesh.tp_rank)
    writer = RecordingWriter(settings.folder, place)
    batch = config.batches.size(trainer.progress.samples)
    count = min(settings.samples, batch)
    samples = tuple(index * batch // count for index in range(count))  # evenly from all of it
    require_room(config, mesh, settings)
    recorder = TensorRecorder(writer, config, mesh, engine, samples)
    _take_steps(trainer, recorder, settings.steps)
    writer.close()
    mesh.control.barrier()
    if mesh.rank == 0:
        run = RecordedRun(
            model=dataclasses.asdict(config.model),
            seq_length=config.training.seq_length,
            global_batch_size=batch,
            samples=samples,
            steps=settings.steps,
            dtype="float64" if settings.float64 else config.training.precision,
            layout=f"tp {mesh.tp_size} x pp {mesh.pp_size} x dp {mesh.dp_size}, ZeRO "
            f"{config.parallel.zero_stage}{', sequence parallel' * config.parallel.sequence_parallel}",
        )
        finish_recording(settings.folder, run)
    mesh.control.barrier()
    close_mesh()


def recorded_bytes(config: RunConfig, mesh: Mesh, settings: RecordSettings) -> int:
    """Return about how many bytes all ranks write: state, and activations of all layers with gradients."""
    model = config.model
    samples = min(settings.samples, config.training.global_batch_size)
    parameters = sum(spec.numel for spec in decoder_specs(model).values())
    state = parameters * (2 * mesh.dp_size + 3)
    units = 5 * model.hidden_size + 2 * model.attention_width + 2 * model.key_width + model.ffn_hidden_size
    units += 3 * (model.nexus_m + model.nexus_a + model.pattention_slots) + model.ffn_nexus_m
    width = mesh.tp_size * (model.num_layers + 1) * units + model.vocab_size
    activations = 2 * samples * config.training.seq_length * width
    return settings.steps * (8 if settings.float64 else 4) * (state + activations)


def require_room(config: RunConfig, mesh: Mesh, settings: RecordSettings) -> None:
    """Raise ConfigError where the disk has no room for a recording; a collective call."""
    wanted, free = recorded_bytes(config, mesh, settings), shutil.disk_usage(settings.folder).free
    problem = ""
    if mesh.rank == 0 and wanted > free:
        problem = (
            f"the recording needs about {size_in_words(wanted)} and {settings.folder} has "
            f"{size_in_words(free)} left: give another disk (TMPDIR, --keep or --record), --steps 1, "
            "--samples 1 or fewer --num-layers"
        )
    if problem := mesh.control.broadcast_str(problem):
        raise ConfigError(problem)


@eager  # hooks read values
def _take_steps(trainer: Trainer, recorder: TensorRecorder, steps: int) -> None:
    config, engine = trainer.config, trainer.engine
    done = trainer.progress
    batch = config.batches.size(done.samples)  # of every step: a ramp-up does not go on
    engine.set_batch_size(batch)
    batches = recorder.batches(trainer.training_batches())
    last = config.training.train_iters
    for step in range(1, steps + 1):
        if config.optimizer.counts_samples:
            end = done.samples + config.batches.samples(done.samples, last - done.step)
            rate = learning_rate(config.optimizer, done.samples + step * batch, end)
        else:
            rate = learning_rate(config.optimizer, done.step + step, last)
        recorder.begin_step(step)
        result = engine.train_step(batches, rate)
        recorder.end_step(result)
        logger.info("step %d: loss %.12g, gradient norm %.12g", step, result.loss, result.grad_norm)
