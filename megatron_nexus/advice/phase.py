"""Where a run is in its learning-rate schedule: in the stable phase, where growth is cheap, or not."""

from dataclasses import dataclass
from enum import StrEnum

from megatron_nexus.advice.curve import Schedule
from megatron_nexus.checkpoint.saved_run import SavedRun
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate

RECOMMENDED = Schedule()


class Phase(StrEnum):
    """A part of a schedule."""

    WARMUP = "warm-up"
    STABLE = "stable"
    DECAY = "decay"
    DECAYED = "after the decay"


@dataclass(frozen=True)
class Position:
    """Where a checkpoint is: its phase, and the tokens left until a decay begins."""

    phase: Phase
    style: str
    stable_tokens_left: float


def position_of(config: RunConfig, step: int, samples: int) -> Position:
    """Return where step `step`, after `samples` samples, is in the schedule of `config`."""
    optimizer, batches = config.optimizer, config.batches
    per_sample = config.training.seq_length
    per_step = batches.size(samples) * per_sample
    last = config.training.train_iters
    at, end = step, last
    if optimizer.counts_samples:
        at, end = samples, batches.samples(0, last)
    warmup, decay_end, wsd = optimizer.lr_spans
    style = optimizer.lr_decay_style
    end = decay_end or end
    unit = per_sample if optimizer.counts_samples else per_step
    if at < optimizer.lr_start_iter + warmup:
        return Position(Phase.WARMUP, style, 0.0)
    if style == "constant":
        return Position(Phase.STABLE, style, float(max(0, end - at) * unit))
    if at >= end:
        return Position(Phase.DECAYED, style, 0.0)
    if learning_rate(optimizer, max(1, at), end) < optimizer.lr:
        return Position(Phase.DECAY, style, 0.0)
    span = end - optimizer.lr_start_iter
    left = end - (wsd or max(1, span // 10)) - at if style == "WSD" else 0
    # Cosine and linear fall from the end of their warm-up on.
    return Position(Phase.STABLE if left > 0 else Phase.DECAY, style, float(max(0, left) * unit))


def position(saved: SavedRun) -> Position:
    """Return where a checkpoint is in the schedule of its run."""
    return position_of(saved.config, saved.manifest.progress.step, saved.manifest.progress.samples)


def schedule_of(config: RunConfig) -> Schedule:
    """Return the WSD schedule of a run, or the recommended one for a run of another style."""
    optimizer, last = config.optimizer, config.training.train_iters
    warmup, decay_end, wsd = optimizer.lr_spans
    per_step = config.training.global_batch_size * config.training.seq_length
    unit, whole = per_step, float(decay_end or last)
    if optimizer.counts_samples:
        unit, whole = config.training.seq_length, float(decay_end or config.batches.samples(0, last))
    if optimizer.lr_decay_style != "WSD" or whole <= 0:
        return Schedule(RECOMMENDED.decay, RECOMMENDED.lowest, float(warmup * unit))
    decay = min(0.5, (wsd or whole / 10) / whole)
    return Schedule(decay, min(1.0, optimizer.min_lr / optimizer.lr), float(warmup * unit))
