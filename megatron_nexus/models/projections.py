"""Projections: the maps from one input X to queries, keys and values, by the model's kind.

    nexus          Y = gelu(gelu(X W_M) W_A) W_D
    linear         Y = X W, or X W + b (Qwen2)
    linear_nexus   Y = X W + gelu(gelu(X W_M) W_A) W_D, or + b
    pattention     Y = gelu(A / ||A||_2 * tau) V, A = X K^T

A trained linear projection becomes linear_nexus: its branch begins with M = A = 0 and grows, so that
exactly one factor of each new path is zero, the function stays and every new weight trains
(`spec.growth_rule`).

X [T, B, D] -> for each projection this rank's columns [T, B, w]: whole heads.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, attention_widths, nexus_rank_specs
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.models.pattention import Pattention, pattention_specs
from megatron_nexus.spec.param import Axis, Constant, Flow, Layout, Normal, ParamSpec, Role


def projection_specs(
    model: ModelConfig, name: str, inputs: Axis, outputs: Axis, flow: Flow
) -> tuple[ParamSpec, ...]:
    """The parameters of the projection `name`. `flow` is what its products do with the units of `outputs`."""
    init, roles = Normal(model.init_method_std), (flow, Flow.READS)
    heads = replace(outputs, layout=Layout.SHARDED)
    linear: tuple[ParamSpec, ...] = (ParamSpec(f"{name}.weight", (heads, inputs), init, Role.MATMUL, roles),)
    if model.add_qkv_bias:  # zero at first, for new units of growth too: it closes no path and opens none
        linear += (ParamSpec(f"{name}.bias", (heads,), Constant(0.0), Role.VECTOR, (flow,)),)
    w_m, w_a, w_d = nexus_rank_specs(name, inputs, outputs, attention_widths(model), init)
    rank = (w_m, w_a, replace(w_d, growth_roles=roles))
    match model.projection:
        case "nexus":
            return rank
        case "linear":
            return linear
        case "linear_nexus":
            return (*linear, *rank)
        case "pattention":
            return pattention_specs(name, inputs, outputs, attention_slots(model), init, init, flow)


def attention_slots(model: ModelConfig) -> Axis:
    """Return the parameter tokens of each Pattention of the attention."""
    return Axis("slots", model.pattention_slots, Layout.SHARDED_PADDED)


class SummedProjections(nn.Module):
    """Nexus-Ranks or Pattentions of one input, whose partial sums one reduce-scatter turns into heads."""

    def __init__(self, maps: NexusRank | Pattention, context: LayerContext) -> None:
        super().__init__()
        self.maps = maps
        self.tp = context.tp

    def forward(self, x_TBD: Tensor) -> tuple[Tensor, ...]:
        """X of all tokens -> this rank's columns of each projection."""
        return self.tp.scatter_features(*self.maps(x_TBD))


class LinearProjections(SpecModule):
    """A matrix for each projection, and its bias if it has one, split by columns: no collective."""

    def __init__(self, specs: Mapping[str, tuple[ParamSpec, ...]], context: LayerContext) -> None:
        weights = {name: parts[0] for name, parts in specs.items()}
        biases = {f"{name}_bias": parts[1] for name, parts in specs.items() if len(parts) > 1}
        super().__init__({**weights, **biases}, context)
        self.biases = {name: f"{name}_bias" if f"{name}_bias" in biases else None for name in weights}

    def forward(self, x_TBD: Tensor) -> tuple[Tensor, ...]:
        """X of all tokens -> this rank's columns of each projection."""
        return tuple(
            F.linear(x_TBD, self.get_parameter(name), self.get_parameter(bias) if bias else None)
            for name, bias in self.biases.items()
        )


class BranchedProjections(nn.Module):
    """A matrix for each projection, and a Nexus-Rank in addition."""

    def __init__(
        self, model: ModelConfig, specs: Mapping[str, tuple[ParamSpec, ...]], context: LayerContext
    ) -> None:
        super().__init__()
        count = 2 if model.add_qkv_bias else 1
        self.linear = LinearProjections({name: parts[:count] for name, parts in specs.items()}, context)
        branches = {name: parts[count:] for name, parts in specs.items()}
        self.branch = SummedProjections(NexusRank(branches, attention_widths(model), context), context)

    def forward(self, x_TBD: Tensor) -> tuple[Tensor, ...]:
        """X of all tokens -> this rank's columns of each projection."""
        return tuple(a + b for a, b in zip(self.linear(x_TBD), self.branch(x_TBD), strict=True))


def make_projections(
    model: ModelConfig, specs: Mapping[str, tuple[ParamSpec, ...]], context: LayerContext
) -> nn.Module:
    """The projections of one input, whose `specs` are those of `projection_specs` by short name ("q")."""
    match model.projection:
        case "nexus":
            return SummedProjections(NexusRank(dict(specs), attention_widths(model), context), context)
        case "linear":
            return LinearProjections(specs, context)
        case "linear_nexus":
            return BranchedProjections(model, specs, context)
        case "pattention":
            return SummedProjections(Pattention(dict(specs), model.attention_scale_slots, context), context)
