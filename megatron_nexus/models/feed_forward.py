"""Feed-forward, of the model's kind. No biases.

    swiglu       y = (silu(x W_gate) * (x W_up)) W_down        (Shazeer, 2020)
    pattention   y = gelu(A / ||A||_2 * tau) V, A = x K^T      (Tokenformer)
    nexus        y = gelu(gelu(x W_M) W_A) W_D                 (as in the code of Nexusformer's authors)

T tokens, B batch, D hidden. W_gate, W_up, K, W_M and W_A are split by columns over tensor-parallel ranks,
W_down, V and W_D by rows.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, feed_forward_widths, nexus_rank_specs
from megatron_nexus.models.norm import block_norm_specs, make_norm
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.models.pattention import Pattention, pattention_specs
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role


def feed_forward_specs(model: ModelConfig, prefix: str) -> dict[str, tuple[ParamSpec, ...]]:
    """Specs of one layer's feed-forward by part: norm; gate, up, down, or slots, or stages."""
    hidden = Axis("hidden", model.hidden_size, residual=True)
    width = Axis("ffn", model.ffn_hidden_size, Layout.SHARDED_PADDED)
    init = Normal(model.init_method_std)
    writer = Normal(model.init_method_std / (2 * model.num_layers) ** 0.5)
    norm = block_norm_specs(model, prefix, hidden)
    match model.feed_forward:
        case "swiglu":
            gates = (Flow.GATES, Flow.READS)
            return {
                "norm": norm,
                "gate": (ParamSpec(f"{prefix}.gate", (width, hidden), init, Role.MATMUL, gates),),
                "up": (ParamSpec(f"{prefix}.up", (width, hidden), init, Role.MATMUL),),
                "down": (ParamSpec(f"{prefix}.down", (hidden, width), writer, Role.MATMUL),),
            }
        case "pattention":
            return {"norm": norm, "slots": pattention_specs(prefix, hidden, hidden, width, init, writer)}
        case "nexus":
            widths, names = feed_forward_widths(model), ("ffn_m", width.name)
            return {
                "norm": norm,
                "stages": nexus_rank_specs(prefix, hidden, hidden, widths, writer, names),
            }


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class SwiGLU(SpecModule):
    """The three matrices: x of all tokens -> this rank's partial sum of y."""

    def __init__(self, parts: dict[str, tuple[ParamSpec, ...]], context: LayerContext) -> None:
        specs = {name: parts[name][0] for name in ("gate", "up", "down")}
        super().__init__(specs, context)
        self.context = context

    def forward(self, x_TBD: Tensor) -> tuple[Tensor]:
        """[T, B, D] -> [T, B, D]."""
        gate = F.linear(x_TBD, self.get_parameter("gate"))
        up = F.linear(x_TBD, self.get_parameter("up"))
        return (self.context.linear_after(swiglu, self.get_parameter("down"), gate, up),)


class FeedForward(nn.Module):
    """x -> feed_forward(norm(x)), or norm(feed_forward(x)) with post-norm, without the residual."""

    def __init__(self, model: ModelConfig, prefix: str, context: LayerContext) -> None:
        super().__init__()
        parts = feed_forward_specs(model, prefix)
        self.tp = context.tp
        self.norm = make_norm(parts["norm"], model, context)
        self.post_norm = model.post_norm
        self.inner: SwiGLU | Pattention | NexusRank
        match model.feed_forward:
            case "swiglu":
                self.inner = SwiGLU(parts, context)
            case "pattention":
                self.inner = Pattention({"slots": parts["slots"]}, model.feed_forward_scale_slots, context)
            case "nexus":
                self.inner = NexusRank({"stages": parts["stages"]}, feed_forward_widths(model), context)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> [T, B, D]."""
        (partial_TBD,) = self.inner(self.tp.enter(x_TBD if self.post_norm else self.norm(x_TBD)))
        y_TBD = self.tp.leave(partial_TBD)
        return self.norm(y_TBD) if self.post_norm else y_TBD
