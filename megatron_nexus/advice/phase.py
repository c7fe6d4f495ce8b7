"""Where a run is in its learning-rate schedule: in the stable phase, where growth is cheap, or not."""

from dataclasses import dataclass
from enum import StrEnum

from megatron_nexus.advice.curve import Schedule
from megatron_nexus.checkpoint.saved_run import SavedRun
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import run_end

RECOMMENDED = Schedule()


class Phase(StrEnum):
    """A part of a schedule."""

    WARMUP = "warm-up"
    STABLE = "stable"
    DECAY = "decay"
    DECAYED = "after the decay"


@dataclass(frozen=True)
class Position:
    """Where a checkpoint is: its phase, and the style of its schedule."""

    phase: Phase
    style: str


def position_of(config: RunConfig, step: int, samples: int) -> Position:
    """Return where step `step`, after `samples` samples, is in the schedule of `config`."""
    optimizer = config.optimizer
    at = samples if optimizer.counts_samples else step
    warmup, decay_end, wsd = optimizer.lr_spans
    style = optimizer.lr_decay_style
    end = decay_end or run_end(config)
    if at < optimizer.lr_start_iter + warmup:
        phase = Phase.WARMUP
    elif style == "constant":
        phase = Phase.STABLE
    elif at >= end:
        phase = Phase.DECAYED
    else:
        # Cosine and linear fall from the end of their warm-up on.
        decay = wsd or max(1, (end - optimizer.lr_start_iter) // 10)
        phase = Phase.STABLE if style == "WSD" and at < end - decay else Phase.DECAY
    return Position(phase, style)


def position(saved: SavedRun) -> Position:
    """Return where a checkpoint is in the schedule of its run."""
    return position_of(saved.config, saved.manifest.progress.step, saved.manifest.progress.samples)


def schedule_of(config: RunConfig) -> Schedule:
    """Return the WSD schedule of a run, or the recommended one for a run of another style."""
    optimizer, training = config.optimizer, config.training
    warmup, decay_end, wsd = optimizer.lr_spans
    unit = training.seq_length * (1 if optimizer.counts_samples else training.global_batch_size)
    whole = float(decay_end or run_end(config))
    if optimizer.lr_decay_style != "WSD" or whole <= 0:
        return Schedule(RECOMMENDED.decay, RECOMMENDED.lowest, float(warmup * unit))
    decay = min(0.5, (wsd or whole / 10) / whole)
    return Schedule(decay, min(1.0, optimizer.min_lr / optimizer.lr), float(warmup * unit))
