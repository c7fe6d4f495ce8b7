"""Rotary position embedding (Su et al., 2021), pairs (i, i + R / 2) of the first R channels of each head.

    angle(t, i) = t * f_i, f_i = base^(-2 i / R)

Llama 3.1 and later (`RopeScaling`) divide slow frequencies, by how often they turn within the L tokens of the
first training:

    turns = L f_i / 2 pi    s = clamp((turns - low) / (high - low), 0, 1)    f_i' = f_i (s + (1 - s) / factor)

T tokens, B batch, N heads, H head size, R <= H: channels that a head has grown later do not turn, so that
the old ones keep their frequencies and partners.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from megatron_nexus.config.model_config import ModelConfig


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later scale their frequencies."""

    factor: float
    low: float
    high: float
    length: int
    """Tokens of the first training's samples, L."""

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The scaled frequencies."""
        turns = self.length * frequencies / (2.0 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


def rope_scaling(model: ModelConfig) -> RopeScaling | None:
    """Return the scaling of a model's frequencies, if it has one."""
    if not model.use_rope_scaling:
        return None
    return RopeScaling(
        model.rope_scaling_factor,
        model.rope_low_freq_factor,
        model.rope_high_freq_factor,
        model.original_max_position_embeddings,
    )


Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the angles of each token: [T, B or 1, 1, R / 2]."""


@lru_cache(maxsize=8)
def rotary_tables(
    tokens: int,
    size: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Tables:
    """Return cosines and sines [T, 1, 1, R / 2] of the angles of `size` = R channels.

    Computed in float64 and rounded once to `dtype`.
    """
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)[:, None, None, :]
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` with its pairs turned by the angles of the tables."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = [
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    ]
    return torch.cat([*turned, rest], dim=-1)


class _Tables(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]


class _Rotate(Function):
    """Rotary embedding that keeps only its tables; backward turns by the opposite angles."""

    @staticmethod
    def forward(ctx: _Tables, x_TBNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_TBNH, cos, sin)

    @staticmethod
    def backward(ctx: _Tables, grad_TBNH: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_TBNH, cos, -sin), None, None


def rotate(x_TBNH: Tensor, tables: Tables | None) -> Tensor:
    """Turn the pairs (i, i + R / 2) of each head by the angles of its token; [T, B, N, H] -> [B, N, T, H].

    Without tables, in a layer that has no positions, change the layout alone.
    """
    turned_TBNH = x_TBNH if tables is None else _Rotate.apply(x_TBNH, *tables)
    return turned_TBNH.permute(1, 2, 0, 3)


def stage_tables(model: ModelConfig, tokens: int, x: Tensor, positions_TB: Tensor | None = None) -> Tables:
    """Return the tables that all layers of a stage share, in the type and on the device of `x`.

    [T, 1, 1, R / 2] for the places 0 to `tokens` - 1, or [T, B, 1, R / 2] for `positions_TB` below `tokens`.
    """
    cos, sin = rotary_tables(
        tokens, model.rotary_channels, model.rotary_base, x.device, x.dtype, rope_scaling(model)
    )
    return (cos, sin) if positions_TB is None else (cos[positions_TB, 0], sin[positions_TB, 0])
