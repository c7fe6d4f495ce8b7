"""SwiGLU feed-forward: y = (silu(x W_gate) * (x W_up)) W_down (Shazeer, 2020). No biases.

T tokens, B batch, D hidden. W_gate and W_up are split by columns over tensor-parallel ranks, W_down by rows.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.run_config import ModelConfig
from megatron_nexus.models.context import Context
from megatron_nexus.models.norm import RMSNorm, rms_norm_spec
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role


def feed_forward_specs(model: ModelConfig, prefix: str) -> dict[str, ParamSpec]:
    """Specs of one layer's feed-forward by part: norm, gate, up, down."""
    hidden = Axis("hidden", model.hidden_size, residual=True)
    width = Axis("ffn", model.ffn_hidden_size, Layout.SPLIT)
    init = Normal(model.init_method_std)
    writer = Normal(model.init_method_std / (2 * model.num_layers) ** 0.5)
    return {
        "norm": rms_norm_spec(f"{prefix}.norm.gain", hidden),
        "gate": ParamSpec(f"{prefix}.gate", (width, hidden), init, Role.MATMUL, (Flow.GATES, Flow.READS)),
        "up": ParamSpec(f"{prefix}.up", (width, hidden), init, Role.MATMUL),
        "down": ParamSpec(f"{prefix}.down", (hidden, width), writer, Role.MATMUL),
    }


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class SwiGLU(SpecModule):
    """The three matrices: x of all tokens -> this rank's partial sum of y."""

    def __init__(self, specs: dict[str, ParamSpec], context: Context) -> None:
        super().__init__(specs, context.shard, context.seed, context.dtype)
        self.context = context

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        gate = F.linear(x_TBD, self.get_parameter("gate"))
        up = F.linear(x_TBD, self.get_parameter("up"))
        return self.context.linear_after(swiglu, self.get_parameter("down"), gate, up)


class FeedForward(nn.Module):
    """x -> SwiGLU(norm(x)), without the residual."""

    def __init__(self, model: ModelConfig, prefix: str, context: Context) -> None:
        super().__init__()
        specs = feed_forward_specs(model, prefix)
        self.tp = context.tp
        self.norm = RMSNorm(specs.pop("norm"), model, context)
        self.swiglu = SwiGLU(specs, context)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        return self.tp.leave(self.swiglu(self.tp.enter(self.norm(x_TBD))))
