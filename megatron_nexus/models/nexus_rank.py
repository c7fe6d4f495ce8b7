"""Nexus-Rank: a three-stage map in place of a linear one.

    H_M = gelu(X W_M)      H_A = gelu(H_M W_A)      Y = H_A W_D        (Nexusformer, equations 3 to 5)

X [T, B, D_in], W_M D_in x M, W_A M x A, W_D A x D_out, D < M < A; no biases; exact GELU. Weights are stored
[out, in]. Over t tensor-parallel ranks W_M and W_A are split by columns and W_D by rows, with one
all-gather of H_M between them; the projections of one X share it.

**Inner norm**, optional: h / (||h||_2 + 1e-5) * c before each GELU. The scale c is a constant, the square
root of the hidden size or, as in the code that the paper's authors released, of the width of h, both as
when the model was initialised: a scale that followed the width would change the function when M or A grows.

**Initial values.** Three matrices of the usual N(0, 0.02^2) give outputs of RMS 0.003 to 0.1, which depend
on M and A. Here the first two stages preserve the variance of their input, and W_D gives Y a third of the
RMS of the linear map in whose place the Nexus-Rank stands, for any M and A:

    std W_M = 1 / sqrt(D_in)   std W_A = 1 / (g_M sqrt(M))   std W_D = std_linear sqrt(D_in) / (3 g_A sqrt(A))

g = sqrt(E[gelu(s z)^2]), z standard normal, s the RMS before the GELU: 1, or scale / sqrt(width) if normed.
Why not all of it: E[gelu] > 0 makes about 30 % of the mean square of Y the same for all tokens, which
attention does not average away, and in training all of it diverged at learning rates at which a third is
best (docs/initial_values.md).
"""

import math
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.kernels.grouped_linear import concatenated_linear, grouped_linear
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.norm import inner_norm
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.spec.param import Axis, Layout, Normal, ParamSpec, Role

OUTPUT_SHARE = 1 / 3
"""RMS of the initial outputs, as a share of those of a linear map."""


@dataclass(frozen=True)
class NexusWidths:
    """The widths M and A of a Nexus-Rank, and the scales of its two inner norms; None: it has none."""

    nexus_m: int
    nexus_a: int
    norm_scales: tuple[float, float] | None = None

    @property
    def rms_before_gelu(self) -> tuple[float, float]:
        """RMS of both inputs of the GELU at initialization, for an X of RMS 1."""
        if self.norm_scales is None:
            return 1.0, 1.0
        scale_m, scale_a = self.norm_scales
        return scale_m / math.sqrt(max(1, self.nexus_m)), scale_a / math.sqrt(max(1, self.nexus_a))


def attention_widths(model: ModelConfig) -> NexusWidths:
    """Return the widths of the Nexus-Ranks of the attention."""
    base = (model.base_nexus_m or model.nexus_m, model.base_nexus_a or model.nexus_a)
    return NexusWidths(model.nexus_m, model.nexus_a, _norm_scales(model, *base))


def feed_forward_widths(model: ModelConfig) -> NexusWidths:
    """Return the widths of a Nexus-Rank feed-forward."""
    base = (
        model.base_ffn_nexus_m or model.ffn_nexus_m,
        model.base_ffn_hidden_size or model.ffn_hidden_size,
    )
    return NexusWidths(model.ffn_nexus_m, model.ffn_hidden_size, _norm_scales(model, *base))


def _norm_scales(model: ModelConfig, base_m: int, base_a: int) -> tuple[float, float] | None:
    if not model.nexus_inner_norm:
        return None
    if model.nexus_inner_norm_scale == "hidden":
        return math.sqrt(model.norm_size), math.sqrt(model.norm_size)
    return math.sqrt(base_m), math.sqrt(base_a)


@cache
def gelu_rms(std: float) -> float:
    """sqrt(E[gelu(std z)^2]) of a standard normal z, by quadrature: 0.652 at std 1."""
    z, weights = np.polynomial.hermite_e.hermegauss(100)
    cdf = np.array([0.5 * (1.0 + math.erf(std * x / math.sqrt(2.0))) for x in z])
    return float(np.sqrt((weights * (std * z * cdf) ** 2).sum() / weights.sum()))


def nexus_rank_specs(
    name: str,
    inputs: Axis,
    outputs: Axis,
    widths: NexusWidths,
    linear: Normal,
    names: tuple[str, str] = ("nexus_m", "nexus_a"),
) -> tuple[ParamSpec, ...]:
    """W_M, W_A and W_D of the Nexus-Rank `name`, whose widths are the axes `names`.

    `linear` is the initialisation of the linear map in whose place it stands. `inputs` and `outputs` are
    REPLICATED axes: all of X is read, and W_D's products are partial sums.
    """
    (name_m, name_a), m, a = names, widths.nexus_m, widths.nexus_a
    m_split, m_whole = Axis(name_m, m, Layout.SHARDED_PADDED), Axis(name_m, m, Layout.GATHERED)
    a_split = Axis(name_a, a, Layout.SHARDED_PADDED)
    gelu_m, gelu_a = map(gelu_rms, widths.rms_before_gelu)
    output_rms = OUTPUT_SHARE * linear.std * math.sqrt(inputs.size)
    # A branch that begins without units (M = A = 0) has no values to draw.
    first = Normal(1.0 / math.sqrt(inputs.size))
    second = Normal(1.0 / (gelu_m * math.sqrt(max(1, m))))
    third = Normal(output_rms / (gelu_a * math.sqrt(max(1, a))))
    return (
        ParamSpec(f"{name}.w_m", (m_split, inputs), first, Role.MATMUL),
        ParamSpec(f"{name}.w_a", (a_split, m_whole), second, Role.MATMUL),
        ParamSpec(f"{name}.w_d", (outputs, a_split), third, Role.MATMUL),
    )


class NexusRank(SpecModule):
    """Several Nexus-Ranks of the same input, with one collective for all."""

    def __init__(
        self, projections: dict[str, tuple[ParamSpec, ...]], widths: NexusWidths, context: LayerContext
    ) -> None:
        """`projections` by short name ("q"), all of the same `widths`."""
        specs = {
            f"{name}_{stage}": spec
            for name, triple in projections.items()
            for stage, spec in zip(("w_m", "w_a", "w_d"), triple, strict=True)
        }
        super().__init__(specs, context)
        self.names = tuple(projections)
        self.context = context
        self.norm_scales: tuple[float | None, float | None] = widths.norm_scales or (None, None)

    def _activation(self, scale: float | None, h: Tensor) -> Tensor:
        if scale is not None:
            h = inner_norm(h, scale, self.context.tp)
        return F.gelu(h)

    def _weights(self, stage: str) -> list[Tensor]:
        return [self.get_parameter(f"{name}_{stage}") for name in self.names]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """X [T, B, D_in] of all tokens -> for each projection this rank's partial sum of Y [T, B, D_out]."""
        if self.context.group_projections and len(self.names) > 1:
            return self._grouped(x)
        scale_m, scale_a = self.norm_scales
        after = partial(self.context.linear_after, partial(self._activation, scale_a))
        w_a = self._weights("w_a")
        h_m = self.context.tp.gather_features(
            *(
                self.context.observer.around(partial(self._activation, scale_m), [reader])(F.linear(x, w_m))
                for w_m, reader in zip(self._weights("w_m"), w_a, strict=True)
            )
        )
        h_a = [F.linear(h, w) for h, w in zip(h_m, w_a, strict=True)]
        return tuple(after(w_d, h) for h, w_d in zip(h_a, self._weights("w_d"), strict=True))

    def _grouped(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward` with one product for all W_M and a batched one for all W_A, and for all W_D of a shape.

        G projections: H_M [T, B, G, M / t] and [G, T, B, M], H_A [G, T, B, A / t].
        """
        scale_m, scale_a = self.norm_scales
        activate = partial(self._activation, scale_a)
        w_m = self._weights("w_m")
        pre_m = concatenated_linear(x, w_m).unflatten(-1, (len(w_m), len(w_m[0])))
        after_m, w_a = self._activation(scale_m, pre_m), self._weights("w_a")
        self.context.observer.report(w_a, pre_m.movedim(-2, 0), after_m.movedim(-2, 0))
        h_m = self.context.tp.gather_grouped_features(after_m)
        pre_a = grouped_linear(h_m, w_a)
        w_d = self._weights("w_d")
        if len({w.shape for w in w_d}) == 1:
            return self.context.grouped_linear_after(activate, w_d, pre_a).unbind()
        after = partial(self.context.linear_after, activate)  # keys and values of fewer heads
        return tuple(after(w, h) for w, h in zip(w_d, pre_a.unbind(), strict=True))
