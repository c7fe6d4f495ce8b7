"""Norms: RMSNorm with a gain before attention, feed-forward and head, and of each head's queries and keys; a
gain-free norm inside Nexus-Rank.

T tokens, B batch, D hidden, N heads of this rank, H head size, R head size at birth.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.run_config import ModelConfig
from megatron_nexus.models.context import Context
from megatron_nexus.models.nvidia_apex import fused_rms_norm
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Axis, Constant, Flow, ParamSpec, Role


def rms_norm_spec(name: str, hidden: Axis) -> ParamSpec:
    """The gain of an RMSNorm over `hidden`."""
    return ParamSpec(name, (hidden,), Constant(1.0), Role.VECTOR, (Flow.GATES,))


class RMSNorm(SpecModule):
    """y = x / sqrt(sum(x^2) / S + eps) * gain (Zhang and Sennrich, 2019).

    S is the hidden size at birth, which D is until it grows: new units, zero at first, change nothing.
    """

    def __init__(self, gain: ParamSpec, model: ModelConfig, context: Context) -> None:
        super().__init__({"gain": gain}, context.shard, context.seed, context.dtype)
        # The same with a mean over D: 1 / sqrt(sum / S + eps) = r / sqrt(sum / D + eps r^2), r^2 = S / D.
        share = model.norm_size / model.hidden_size
        self.epsilon = model.norm_epsilon * share
        self.gain_scale = math.sqrt(share)
        self.tp = context.tp
        self.normalise = fused_rms_norm() if context.norm_impl == "apex" else F.rms_norm

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        gain_D = self.tp.replicated(self.get_parameter("gain"))
        if self.gain_scale != 1.0:
            gain_D = gain_D * self.gain_scale
        return self.normalise(x_TBD, gain_D.shape, gain_D, self.epsilon)


class HeadNorm(SpecModule):
    """y = x / sqrt(mean of the first R channels' squares + eps) * gain for each head alone: Qwen3's QK norm.

    Channels that a head has grown later are scaled alike but not counted: they would change the function.
    """

    def __init__(self, gain: ParamSpec, model: ModelConfig, context: Context) -> None:
        super().__init__({"gain": gain}, context.shard, context.seed, context.dtype)
        self.epsilon = model.norm_epsilon
        self.counted = model.rotary_channels
        self.tp = context.tp
        self.normalise = fused_rms_norm() if context.norm_impl == "apex" else F.rms_norm

    def forward(self, x_TBNH: Tensor) -> Tensor:
        """[T, B, N, H] -> [T, B, N, H]."""
        # One gain for all heads, of which each rank has its own.
        gain_H = self.tp.shared(self.get_parameter("gain"))
        if self.counted == x_TBNH.shape[-1]:
            return self.normalise(x_TBNH, gain_H.shape, gain_H, self.epsilon)
        wide = x_TBNH.to(torch.promote_types(x_TBNH.dtype, torch.float32))
        mean = wide[..., : self.counted].square().mean(dim=-1, keepdim=True)
        return (wide * (mean + self.epsilon).rsqrt()).to(x_TBNH.dtype) * gain_H


def inner_norm(h: Tensor, scale: float, tp: TensorParallel) -> Tensor:
    """h / (||h||_2 + 1e-5) * scale over a last axis that tensor-parallel ranks share.

    The scale does not follow the width of h: one that did would change the function when M or A grows.
    One all-reduce of a number per token; computed in float32 or better.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    # The clamp gives a zero h the gradient 0 where the square root alone would give NaN.
    length = tp.shared_sum(wide.square().sum(dim=-1, keepdim=True)).clamp_min(1e-30).sqrt()
    return (wide * (scale / (length + 1e-5))).to(h.dtype)
