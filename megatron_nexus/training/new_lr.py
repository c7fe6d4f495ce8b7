"""A learning rate of its own for the weights of the last growth, while the others keep the schedule's.

    w += (r - 1) (w - w_before)        r = ratio min(1, k / warm-up), k the optimizer steps since the growth

after each optimizer step: what AdamW does at r times the learning rate, weight decay included, for any
implementation of it and wherever ZeRO has cut its buffers. During an optimizer step this rank keeps a copy of
its part of the new weights; while r is 1 it keeps none.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_nexus.checkpoint.manifest import GrownRegion
from megatron_nexus.config.run_config import OptimizerConfig
from megatron_nexus.training.grown_adam import GrownView, grown_views, stepping
from megatron_nexus.training.zero_state import ZeroState


def new_lr_factor(optimizer: OptimizerConfig, steps: int) -> float:
    """Return what the learning rate of new weights is multiplied by at their step `steps`, counted from 1."""
    warmup = optimizer.new_lr_warmup_iters
    return optimizer.new_lr_ratio * (min(1.0, steps / warmup) if warmup else 1.0)


def install_new_lr(state: ZeroState, newest: Sequence[GrownRegion], optimizer: OptimizerConfig) -> None:
    """Give the weights in `newest` their learning rate after every optimizer step from now on."""
    views = grown_views(state, newest)
    before: list[tuple[GrownView, float, Tensor]] = []

    @torch.no_grad()
    def keep(adam: torch.optim.Optimizer, *_: object) -> None:
        for view, count, _group in stepping(views, adam):
            factor = new_lr_factor(optimizer, count + 1 - view.adam_step)
            if factor != 1.0:
                before.append((view, factor, view.states["fp32"].clone()))

    @torch.no_grad()
    def scale(*_: object) -> None:
        for view, factor, weights in before:
            now = view.states["fp32"]
            now.copy_(weights.lerp_(now, factor))
        before.clear()

    if views:
        state.around_each_step(keep, scale)


def continue_new_lr(
    state: ZeroState, newest: Sequence[GrownRegion], loaded_count: int, optimizer: OptimizerConfig
) -> str:
    """Install the learning rate of `newest`, and return what a run says of it when it resumes.

    `loaded_count` is the checkpoint's step count of Adam, which the run may since have set to zero.
    """
    count = state.step_count
    newest = [replace(region, adam_step=region.adam_step + count - loaded_count) for region in newest]
    install_new_lr(state, newest, optimizer)
    return _message(newest, count, optimizer)


def _message(newest: Sequence[GrownRegion], count: int, optimizer: OptimizerConfig) -> str:
    ratio, warmup = optimizer.new_lr_ratio, optimizer.new_lr_warmup_iters
    if not newest:
        return (
            f"--new-lr-ratio {ratio:g} and --new-lr-warmup-iters {warmup} change nothing: the run has never "
            "grown"
        )
    elements = sum(region.box.numel for region in newest)
    age = count - newest[0].adam_step
    return (
        f"the {elements:,} weights of the last growth, {age:,} steps ago, train at {ratio:g} x the learning "
        f"rate, after a warm-up of {warmup:,} steps"
    )
