"""Nexus-Rank: a three-stage map in place of a linear projection.

    H_M = gelu(X W_M)      H_A = gelu(H_M W_A)      Y = H_A W_D        (Nexusformer, equations 3 to 5)

X [T, B, D_in], W_M D_in x M, W_A M x A, W_D A x D_out, D < M < A; no biases; exact GELU. Weights are stored
[out, in]. Over t tensor-parallel ranks W_M and W_A are split by columns and W_D by rows, with one
all-gather of H_M between them; the projections of one X share it.
"""

import math
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.models.context import Context
from megatron_nexus.models.norm import inner_norm
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.spec.param import Axis, Layout, Normal, ParamSpec, Role


def nexus_rank_specs(
    name: str, inputs: Axis, outputs: Axis, nexus_m: int, nexus_a: int, init: Normal, out_init: Normal
) -> tuple[ParamSpec, ...]:
    """W_M, W_A and W_D of the projection `name`; `out_init` is W_D's.

    `inputs` and `outputs` are WHOLE axes: all of X is read, and W_D's products are partial sums.
    """
    m_split, m_whole = Axis("nexus_m", nexus_m, Layout.SPLIT), Axis("nexus_m", nexus_m, Layout.GATHERED)
    a_split = Axis("nexus_a", nexus_a, Layout.SPLIT)
    return (
        ParamSpec(f"{name}.w_m", (m_split, inputs), init, Role.MATMUL),
        ParamSpec(f"{name}.w_a", (a_split, m_whole), init, Role.MATMUL),
        ParamSpec(f"{name}.w_d", (outputs, a_split), out_init, Role.MATMUL),
    )


class NexusRank(SpecModule):
    """Several Nexus-Rank projections of the same input, with one collective for all."""

    def __init__(
        self,
        projections: dict[str, tuple[ParamSpec, ...]],
        inner_norm_scale: float | None,
        context: Context,
    ) -> None:
        """`projections` by short name ("q"); `inner_norm_scale` None: no inner norm."""
        specs = {
            f"{name}_{stage}": spec
            for name, triple in projections.items()
            for stage, spec in zip(("w_m", "w_a", "w_d"), triple, strict=True)
        }
        super().__init__(specs, context.shard, context.seed, context.dtype)
        self.names = tuple(projections)
        self.context = context
        self.inner_norm_scale = inner_norm_scale

    def _activation(self, h: Tensor) -> Tensor:
        if self.inner_norm_scale is not None:
            h = inner_norm(h, self.inner_norm_scale, self.context.tp)
        return F.gelu(h)

    def _weights(self, stage: str) -> list[Tensor]:
        return [self.get_parameter(f"{name}_{stage}") for name in self.names]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """X [T, B, D_in] of all tokens -> for each projection this rank's partial sum of Y [T, B, D_out]."""
        after = partial(self.context.linear_after, self._activation)
        h_m = self.context.tp.gather_features(
            *(self._activation(F.linear(x, w_m)) for w_m in self._weights("w_m"))
        )
        h_a = [F.linear(h, w_a) for h, w_a in zip(h_m, self._weights("w_a"), strict=True)]
        return tuple(after(w_d, h) for h, w_d in zip(h_a, self._weights("w_d"), strict=True))


def inner_norm_scale(norm_size: int) -> float:
    """The fixed scale of the inner norm: the root of D at birth."""
    return math.sqrt(norm_size)
