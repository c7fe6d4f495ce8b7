"""Pattention: attention over parameter tokens in place of a linear map (Tokenformer, Wang et al., 2024).

    Pattention(X; K, V) = gelu(A / ||A||_2 * tau) V        A = X K^T        tau = root of n before growth

X [.., D_in], keys K [n, D_in], values V stored [D_out, n]; n parameter tokens ("slots"), over which the norm
goes; no biases; exact GELU. The code that its authors have released takes the root of the present n: then a
slot more rescales all others. Here tau is that of the n that the model was born with (equal until it grows).

**Growth.** A new slot with zero keys has A = 0: the norm stays, gelu(0) = 0, the function stays. With random
values a gradient reaches its keys, through gelu'(0) = 1/2, and after their first step its values: exactly
one zero factor, `out_rand`. Random keys with zero values, `in_rand`, enter the norm at once and so change
every other slot's share, which is why it is refused. Padding is a slot whose values are zero too: inert.

**Over t tensor-parallel ranks** slots or output columns can be split. f = (t - 1) / t; elements moved per
token and rank, forward and backward, by Q, K and V of width W:

    slots       f (6 W + 12)   reduce-scatter of partial outputs into heads, all-reduce of three squared norms
    columns     0              but each rank computes A, 2 D n FLOPs each, for all slots: f 18 D n FLOPs more,
                               and holds all keys with their moments and all of A for backward

With W = D and two bytes an element columns buy 12 D bytes by 18 D n FLOPs, 1.5 n FLOPs a byte, which pays on
machines of more FLOPs per byte moved than that: 3,000 at n = 2,048. The output projection, whose input lies
by heads, and the feed-forward, whose output is the residual stream, would need collectives as wide as
these in either way. So slots are split, everywhere.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role

EMPTY = 1e-20
"""Squared length below which a vector counts as zero: its inverse length would be no number to go on with."""


def pattention_specs(
    name: str,
    inputs: Axis,
    outputs: Axis,
    slots: Axis,
    init: Normal,
    out_init: Normal,
    flow: Flow = Flow.WRITES,
) -> tuple[ParamSpec, ...]:
    """Keys and values of the Pattention `name`; `out_init` is the values', `flow` what their products do.

    `inputs` and `outputs` are REPLICATED axes: all of X is read, and V's products are partial sums.
    """
    assert slots.layout is Layout.SHARDED_PADDED, f"{slots} is not shared out"
    return (
        ParamSpec(f"{name}.keys", (slots, inputs), init, Role.MATMUL),
        ParamSpec(f"{name}.values", (outputs, slots), out_init, Role.MATMUL, (flow, Flow.READS)),
    )


class Pattention(SpecModule):
    """Several Pattentions of the same input, with one collective for the norms of all."""

    def __init__(
        self, pairs: dict[str, tuple[ParamSpec, ...]], base_slots: int, context: LayerContext
    ) -> None:
        """`pairs` of keys and values by short name ("q")."""
        specs = {
            f"{name}_{part}": spec
            for name, pair in pairs.items()
            for part, spec in zip(("keys", "values"), pair, strict=True)
        }
        super().__init__(specs, context)
        self.names = tuple(pairs)
        self.context = context
        self.scale = float(base_slots) ** 0.5

    def _activation(self, scores: Tensor, factor: Tensor) -> Tensor:
        return F.gelu((scores * factor).to(scores.dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """X [T, B, D_in] of all tokens -> for each this rank's partial sum of its output [T, B, D_out]."""
        after = partial(self.context.linear_after, self._activation)
        scores = [F.linear(x, self.get_parameter(f"{name}_keys")) for name in self.names]
        squares = torch.cat([squared_length(a) for a in scores], dim=-1)
        factors = inverse_root(self.context.tp.all_reduce_stat(squares)) * self.scale
        return tuple(
            after(self.get_parameter(f"{name}_values"), a, factor)
            for name, a, factor in zip(self.names, scores, factors.split(1, dim=-1), strict=True)
        )


def squared_length(a: Tensor) -> Tensor:
    """Return the sum of squares over the last axis, [..., n] -> [..., 1], in float32 or better.

    Of `a` nothing is kept but itself, in its own type.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=wide).square()


def inverse_root(squares: Tensor) -> Tensor:
    """1 / sqrt of each, and 0 with the gradient 0 where it is EMPTY: such a vector has no direction."""
    empty = squares < EMPTY
    return squares.masked_fill(empty, 1.0).rsqrt().masked_fill(empty, 0.0)
