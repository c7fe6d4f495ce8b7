"""Norms: RMSNorm with a gain before attention, feed-forward and head; a gain-free norm inside Nexus-Rank.

T tokens, B batch, D hidden.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.models.context import Context
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Axis, Constant, ParamSpec, Role


def rms_norm_spec(name: str, hidden: Axis) -> ParamSpec:
    """The gain of an RMSNorm over `hidden`."""
    return ParamSpec(name, (hidden,), Constant(1.0), Role.VECTOR)


class RMSNorm(SpecModule):
    """y = x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019)."""

    def __init__(self, gain: ParamSpec, epsilon: float, context: Context) -> None:
        super().__init__({"gain": gain}, context.shard, context.seed, context.dtype)
        self.epsilon = epsilon
        self.tp = context.tp

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        gain_D = self.tp.replicated(self.get_parameter("gain"))
        return F.rms_norm(x_TBD, gain_D.shape, gain_D, self.epsilon)


def inner_norm(h: Tensor, scale: float, tp: TensorParallel) -> Tensor:
    """h / (||h||_2 + 1e-5) * scale over a last axis that tensor-parallel ranks share.

    The scale does not follow the width of h: one that did would change the function when M or A grows.
    One all-reduce of a number per token; computed in float32 or better.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    # The clamp gives a zero h the gradient 0 where the square root alone would give NaN.
    length = tp.shared_sum(wide.square().sum(dim=-1, keepdim=True)).clamp_min(1e-30).sqrt()
    return (wide * (scale / (length + 1e-5))).to(h.dtype)
