"""Norms: RMSNorm with a gain, or LayerNorm without one, before attention, feed-forward and head; RMSNorm of
each head's queries and keys; a gain-free norm inside Nexus-Rank.

T tokens, B batch, D hidden, S hidden size before growth, N heads of this rank, H head size,
R head size before growth.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nvidia_apex import rms_norm
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Axis, Constant, Flow, ParamSpec, Role


def rms_norm_spec(name: str, hidden: Axis) -> ParamSpec:
    """Return the gain of an RMSNorm over `hidden`."""
    return ParamSpec(name, (hidden,), Constant(1.0), Role.VECTOR, (Flow.GATES,))


class RMSNorm(SpecModule):
    """y = x / sqrt(sum(x^2) / S + eps) * gain (Zhang and Sennrich, 2019).

    S is the hidden size before growth, which is D until it grows: new units, zero at first, change nothing.
    """

    def __init__(self, gain: ParamSpec, model: ModelConfig, context: LayerContext) -> None:
        super().__init__({"gain": gain}, context)
        # The same with a mean over D: 1 / sqrt(sum / S + eps) = r / sqrt(sum / D + eps r^2), r^2 = S / D.
        ratio = model.norm_size / model.hidden_size
        self.epsilon = model.norm_epsilon * ratio
        self.gain_scale = math.sqrt(ratio)
        self.tp = context.tp
        self.normalise = rms_norm(context.norm_impl)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        gain_D = self.tp.sum_grad_under_sp(self.get_parameter("gain"))
        if self.gain_scale != 1.0:
            gain_D = gain_D * self.gain_scale
        return self.normalise(x_TBD, gain_D.shape, gain_D, self.epsilon)


class NonParametricLayerNorm(nn.Module):
    """y = (x - m) / sqrt(|x - m|^2 / S + eps), m the mean of the first S units, without gain and bias.

    LayerNorm (Ba et al., 2016) is RMSNorm of what is left of x off the direction (1, .., 1). Growth of D
    keeps that direction, now (1, .., 1, 0, .., 0): new units are scaled and counted as the others but neither
    enter m nor have it subtracted. While they are zero nothing changes, since those that read them read
    zeros, and each of them has a gradient. At D = S it is the common LayerNorm.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.epsilon = model.norm_epsilon
        self.centred = model.norm_size

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        base_size, size = self.centred, x_TBD.shape[-1]
        if base_size == size:
            return F.layer_norm(x_TBD, (size,), eps=self.epsilon)
        wide = x_TBD.to(torch.promote_types(x_TBD.dtype, torch.float32))
        old, new = wide.split([base_size, size - base_size], dim=-1)
        rest = torch.cat([old - old.mean(dim=-1, keepdim=True), new], dim=-1)
        # The mean over S by one over D, as in RMSNorm.
        ratio = base_size / size
        return (F.rms_norm(rest, (size,), eps=self.epsilon * ratio) * math.sqrt(ratio)).to(x_TBD.dtype)


def norm_specs(model: ModelConfig, name: str, hidden: Axis) -> tuple[ParamSpec, ...]:
    """Return the parameters of the norm `name` over `hidden`: a gain, or none."""
    match model.normalization:
        case "RMSNorm":
            return (rms_norm_spec(f"{name}.gain", hidden),)
        case "NonParametricLayerNorm":
            return ()


def block_norm_specs(model: ModelConfig, prefix: str, hidden: Axis) -> tuple[ParamSpec, ...]:
    """Return the parameters of the norm of an attention or feed-forward: of its input, or of its output."""
    return norm_specs(model, f"{prefix}.{'post_norm' if model.post_norm else 'norm'}", hidden)


def make_norm(specs: tuple[ParamSpec, ...], model: ModelConfig, context: LayerContext) -> nn.Module:
    """Return the norm of the model's kind, whose `specs` are those of `norm_specs`."""
    match model.normalization:
        case "RMSNorm":
            return RMSNorm(specs[0], model, context)
        case "NonParametricLayerNorm":
            return NonParametricLayerNorm(model)


class HeadNorm(SpecModule):
    """y = x / sqrt(mean of the first R channels' squares + eps) * gain for each head alone: Qwen3's QK norm.

    Channels that a head has grown later are scaled alike but not counted: they would change the function.
    """

    def __init__(self, gain: ParamSpec, model: ModelConfig, context: LayerContext) -> None:
        super().__init__({"gain": gain}, context)
        self.epsilon = model.norm_epsilon
        self.counted = model.rotary_channels
        self.tp = context.tp
        self.normalise = rms_norm(context.norm_impl)

    def forward(self, x_TBNH: Tensor) -> Tensor:
        """[T, B, N, H] -> [T, B, N, H]."""
        # One gain for all heads, of which each rank has its own.
        gain_H = self.tp.sum_grad(self.get_parameter("gain"))
        if self.counted == x_TBNH.shape[-1]:
            return self.normalise(x_TBNH, gain_H.shape, gain_H, self.epsilon)
        wide = x_TBNH.to(torch.promote_types(x_TBNH.dtype, torch.float32))
        mean = wide[..., : self.counted].square().mean(dim=-1, keepdim=True)
        return (wide * (mean + self.epsilon).rsqrt()).to(x_TBNH.dtype) * gain_H


class AllHeadsNorm(SpecModule):
    """y = x / sqrt(mean of all channels' squares + eps) * gain of all heads: OLMo 2's QK norm.

    Tensor-parallel ranks share the heads, hence the gain, and the mean: an all-reduce of a number a token.
    """

    def __init__(self, gain: ParamSpec, model: ModelConfig, context: LayerContext) -> None:
        super().__init__({"gain": gain}, context)
        self.epsilon = model.norm_epsilon
        self.size = gain.numel
        self.tp = context.tp

    def forward(self, x_TBNH: Tensor) -> Tensor:
        """[T, B, N, H] -> [T, B, N, H]."""
        wide = x_TBNH.to(torch.promote_types(x_TBNH.dtype, torch.float32))
        squares = self.tp.all_reduce_stat(wide.square().sum(dim=(-2, -1), keepdim=True))
        gain_NH = self.get_parameter("gain").view(x_TBNH.shape[-2:])
        return (wide * (squares / self.size + self.epsilon).rsqrt()).to(x_TBNH.dtype) * gain_NH


def inner_norm(h: Tensor, scale: float, tp: TensorParallel) -> Tensor:
    """h / (||h||_2 + 1e-5) * scale over a last axis that tensor-parallel ranks share.

    The scale does not follow the width of h: one that did would change the function when M or A grows.
    One all-reduce of a number per token; computed in float32 or better.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    # The clamp gives a zero h the gradient 0 where the square root alone would give NaN.
    length = tp.all_reduce_stat(wide.square().sum(dim=-1, keepdim=True)).clamp_min(1e-30).sqrt()
    return (wide * (scale / (length + 1e-5))).to(h.dtype)
