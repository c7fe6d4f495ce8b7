"""Weights that growth has added count their optimizer steps from their own first one.

Adam divides its moments by 1 - beta^t. All elements of a buffer overlap t; a new element, whose moments began
at zero k steps ago, needs k. With the shared t its first updates would be up to 6.6 times the learning
rate at beta2 = 0.999 and half of it at 0.95. So after each step of the optimizer

    w += lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) - m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps))

which is, up to rounding, Adam with a count for each element (Kingma and Ba, 2015, algorithm 1), wherever ZeRO
has cut the buffers, without memory for it. It ends when float32 no longer shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import index_within, intersect
from megatron_nexus.checkpoint.manifest import GrownRegion
from megatron_nexus.training.zero_state import ZeroState, memory_address

VISIBLE = 2.0**-25
"""beta^k below this is lost when subtracted from 1 in float32."""


@dataclass(frozen=True)
class GrownView:
    """Views of the weights and moments that a growth added, and Adam's step count at that growth."""

    adam_step: int
    states: Mapping[str, Tensor]


GrownViews = Mapping[int, Sequence[GrownView]]
"""The views of grown regions on this rank, by the buffer that they lie in."""


def stepping(
    views: GrownViews, adam: torch.optim.Optimizer
) -> Iterator[tuple[GrownView, int, Mapping[str, Any]]]:
    """Yield each view of the buffers that `adam` steps: DeepSpeed has it step a few at a time.

    With Adam's step count and the parameter group of the buffer.
    """
    for group in adam.param_groups:
        for flat in group["params"]:
            if held := views.get(memory_address(flat)):
                # Once a buffer: a fused AdamW has it on the GPU. apex: by group.
                count = int(adam.state[flat].get("step", group.get("step", 0)))
                yield from ((view, count, group) for view in held)


def grown_views(state: ZeroState, regions: Sequence[GrownRegion]) -> GrownViews:
    """Return the views of this rank's parts of `regions`."""
    of_tensor: dict[str, list[GrownRegion]] = {}
    for region in regions:
        of_tensor.setdefault(region.tensor, []).append(region)
    of_buffer: dict[int, list[GrownView]] = {}
    for view in state.views():
        for region in of_tensor.get(view.spec.name, []):
            if overlap := intersect(region.box, view.box):
                within = index_within(overlap, view.box)
                values = {name: held[within] for name, held in view.values.items()}
                of_buffer.setdefault(memory_address(values["fp32"]), []).append(
                    GrownView(region.adam_step, values)
                )
    return of_buffer


def needing_correction(
    regions: Sequence[GrownRegion], step: int, betas: tuple[float, float]
) -> list[GrownRegion]:
    """Return the grown regions whose Adam bias correction still differs in float32."""
    return [region for region in regions if max(betas) ** (step - region.adam_step) > VISIBLE]


def install_bias_correction(state: ZeroState, regions: Sequence[GrownRegion]) -> None:
    """Correct the bias correction of this rank's grown weights after every optimizer step."""
    views = grown_views(state, regions)

    @torch.no_grad()
    def correct(adam: torch.optim.Optimizer, *_: object) -> None:
        for view, count, group in stepping(views, adam):
            _correct(view, count, group["lr"], group["betas"], group["eps"])

    if views:
        state.around_each_step(after=correct)


def _correct(part: GrownView, count: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    age = count - part.adam_step
    if max(betas) ** age <= VISIBLE:
        return

    def update(steps: int) -> Tensor:
        first, second = (1.0 - beta**steps for beta in betas)
        return part.states["exp_avg"] / first / (part.states["exp_avg_sq"] / second).sqrt_().add_(eps)

    part.states["fp32"].add_(update(count).sub_(update(age)), alpha=lr)
