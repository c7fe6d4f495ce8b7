"""The learning rate as a pure function of the step: there is no scheduler state to save."""

import math

from megatron_nexus.config.run_config import OptimizerConfig, RunConfig


def learning_rate(optimizer: OptimizerConfig, step: int, last: int) -> float:
    """Return the learning rate of the optimizer step `step` of `last`, counted from 1.

    Linear warm-up from zero, then the chosen decay from `lr` to `min_lr`, reached at the end of the decay
    and kept after it; all counted from the step `lr_start_iter`. WSD stays at `lr` and decays linearly over
    its last steps. Where the optimizer `counts_samples`, `step` is the samples read after the step, and
    `last` all those of the run.
    """
    warmup, decay, wsd = optimizer.lr_spans
    peak, low = optimizer.lr, optimizer.min_lr
    end = max(1, (decay or last) - optimizer.lr_start_iter)
    step = max(1, step - optimizer.lr_start_iter)
    if step <= warmup:
        return peak * step / warmup
    if optimizer.lr_decay_style == "constant":
        return peak
    if step >= end:
        return low
    match optimizer.lr_decay_style:
        case "cosine":
            done = (step - warmup) / (end - warmup)
            return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            done = (step - warmup) / (end - warmup)
            return low + (peak - low) * (1.0 - done)
        case "WSD":
            length = wsd or max(1, end // 10)
            return low + (peak - low) * min(1.0, (end - step) / length)


def position(config: RunConfig, step: int) -> int:
    """Return an optimizer step of a run as its schedule counts: itself, or the samples read by then."""
    return config.batches.samples(0, step) if config.optimizer.counts_samples else step


def run_end(config: RunConfig) -> int:
    """Return the last step of a run, or its last sample, as its schedule counts."""
    return position(config, config.training.train_iters)


def decayed_rate(config: RunConfig, step: int) -> float | None:
    """Return the learning rate of a run's optimizer step `step` where its decay has begun, else None."""
    optimizer, step = config.optimizer, position(config, step)
    if step <= optimizer.lr_start_iter + optimizer.lr_spans[0]:
        return None
    rate = learning_rate(optimizer, step, run_end(config))
    return rate if rate < optimizer.lr * (1.0 - 1e-9) else None


def next_length(config: RunConfig, step: int) -> int:
    """Return how long to make a run that has ended at `step`: up to the end of its decay, else twice as long.

    A run that is to be grown in the stable phase ends before --lr-decay-iters, or --lr-decay-samples.
    """
    _, end, _ = config.optimizer.lr_spans
    if config.optimizer.counts_samples:
        end = config.batches.steps(0, end)
    return end if end > step else 2 * max(config.training.train_iters, step)
