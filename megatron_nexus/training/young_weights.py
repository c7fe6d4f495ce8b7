"""Weights that growth has added count their optimizer steps from their own first one.

Adam divides its moments by 1 - beta^t. All elements of a buffer share t; a new element, whose moments began
at zero k steps ago, needs k. With the shared t its first updates would be up to 6.6 times the learning
rate at beta2 = 0.999 and half of it at 0.95. So after each step of the optimizer

    w += lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) - m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps))

which is, up to rounding, Adam with a count for each element (Kingma and Ba, 2015, algorithm 1), wherever ZeRO
has cut the buffers, without memory for it. It ends when float32 no longer shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nexus.checkpoint.manifest import Birth
from megatron_nexus.checkpoint.pieces import index_within, intersect, slabs
from megatron_nexus.checkpoint.zero_pieces import Engine, Parameters, zero_state
from megatron_nexus.spec.shard import Shard

VISIBLE = 2.0**-25
"""beta^k below this is lost beside 1 in float32."""


@dataclass(frozen=True)
class _Young:
    """A part of a buffer that growth has added: the count at its birth, views of its weights and moments."""

    born: int
    states: Mapping[str, Tensor]


def still_young(births: Sequence[Birth], step_count: int, betas: tuple[float, float]) -> list[Birth]:
    """The births whose own count still differs visibly from the shared one."""
    return [birth for birth in births if max(betas) ** (step_count - birth.step_count) > VISIBLE]


def watch_young_weights(
    engine: Engine, parameters: Parameters, shard: Shard, births: Sequence[Birth]
) -> None:
    """Correct every optimizer step of `engine` for the weights that `births` describe, on this rank."""
    state = zero_state(engine.optimizer)
    of_tensor: dict[str, list[Birth]] = {}
    for birth in births:
        of_tensor.setdefault(birth.tensor, []).append(birth)
    parts: dict[int, list[_Young]] = {}
    for fragment in state.fragments(parameters):
        for slab in slabs(fragment.spec, shard, fragment.start, fragment.count):
            for birth in of_tensor.get(fragment.spec.name, []):
                share = intersect(birth.box, slab.box)
                if share is not None:
                    run = slice(slab.start, slab.start + slab.run_length)
                    within = index_within(share, slab.box)
                    views = {
                        name: flat[run].view(slab.stored)[slab.corner][within]
                        for name, flat in fragment.states.items()
                    }
                    parts.setdefault(_buffer(views["fp32"]), []).append(_Young(birth.step_count, views))

    @torch.no_grad()
    def correct(adam: torch.optim.Optimizer, *_: object) -> None:
        for group in adam.param_groups:
            for flat in group["params"]:
                for part in parts.get(_buffer(flat), ()):
                    count = int(group.get("step") or adam.state[flat]["step"])
                    _correct(part, count, group["lr"], group["betas"], group["eps"])

    if parts:
        state.after_each_step(correct)


def _buffer(view: Tensor) -> int:
    """The memory that a view is of."""
    return view.untyped_storage().data_ptr()


def _correct(part: _Young, count: int, lr: float, betas: tuple[float, float], eps: float) -> None:
    age = count - part.born
    if max(betas) ** age <= VISIBLE:
        return

    def update(steps: int) -> Tensor:
        first, second = (1.0 - beta**steps for beta in betas)
        return part.states["exp_avg"] / first / (part.states["exp_avg_sq"] / second).sqrt_().add_(eps)

    part.states["fp32"].add_(update(count).sub_(update(age)), alpha=lr)
