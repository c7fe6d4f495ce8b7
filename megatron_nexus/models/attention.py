"""Causal multi-head attention over Q, K and V of any kind of projection; with Nexus-Rank: Nexus-Attention.

    attention = softmax(Q K^T / sqrt(H)) V        (Nexusformer, equations 6 to 9), rotary positions

Several heads may share one of keys and values (grouped-query attention, Ainslie et al., 2023): neighbours do.
At an order above 1 inner attentions refine queries and keys first: see `higher_order`.

T tokens, B batch, D hidden, N heads of this rank, H head size, W = all heads x H the attention width. Where
heads have grown, the root is that of their size before growth.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.kernels.causal_attention import LONGEST, causal_attention
from megatron_nexus.kernels.document_attention import block_masked_attention
from megatron_nexus.models.higher_order import Refinement, each_head, gate_specs
from megatron_nexus.models.kv_cache import LayerCache
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, attention_widths, nexus_rank_specs
from megatron_nexus.models.norm import AllHeadsNorm, HeadNorm, block_norm_specs, make_norm, rms_norm_spec
from megatron_nexus.models.packing import Packing, window_mask
from megatron_nexus.models.parameters import Linear
from megatron_nexus.models.pattention import Pattention, pattention_specs
from megatron_nexus.models.projections import attention_slots, make_projections, projection_specs
from megatron_nexus.models.rotary import Tables, rotate
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role


def attention_specs(model: ModelConfig, prefix: str) -> dict[str, tuple[ParamSpec, ...]]:
    """Specs of one layer's attention by part: norm, q, k, v, where it has them QK norms and gates, output."""
    hidden = Axis("hidden", model.hidden_size, residual=True)
    width = Axis("attention", model.attention_width, group=model.kv_channels)
    keys = width
    if model.query_groups < model.num_attention_heads:
        keys = Axis("keys", model.key_width, group=model.kv_channels)
    writer = Normal(model.init_method_std / (2 * model.num_layers) ** 0.5)
    parts: dict[str, tuple[ParamSpec, ...]] = {"norm": block_norm_specs(model, prefix, hidden)}
    outputs = {"q": (width, Flow.SCORES), "k": (keys, Flow.GATES), "v": (keys, Flow.WRITES)}
    for name, (axis, flow) in outputs.items():
        parts[name] = projection_specs(model, f"{prefix}.{name}", hidden, axis, flow)
    if model.qk_layernorm:
        for name, axis in (("q_norm", width), ("k_norm", keys)):
            channels = Axis("channels", model.kv_channels, group=model.kv_channels)
            if model.qk_layernorm_all_heads:
                channels = replace(axis, layout=Layout.SHARDED)
            parts[name] = (rms_norm_spec(f"{prefix}.{name}.gain", channels),)
    parts |= gate_specs(model, prefix)
    if model.projection == "pattention":
        init, slots = Normal(model.init_method_std), attention_slots(model)
        parts["output"] = pattention_specs(f"{prefix}.output", width, hidden, slots, init, writer)
    elif model.nexus_output_projection:
        widths = attention_widths(model)
        parts["output"] = nexus_rank_specs(f"{prefix}.output", width, hidden, widths, writer)
    else:
        heads = replace(width, layout=Layout.SHARDED)
        parts["output"] = (ParamSpec(f"{prefix}.output.weight", (hidden, heads), writer, Role.MATMUL),)
    return parts


class Attention(nn.Module):
    """x -> attention(norm(x)), or norm(attention(x)) with post-norm, without the residual."""

    def __init__(
        self, model: ModelConfig, prefix: str, context: LayerContext, has_rotary: bool = True
    ) -> None:
        super().__init__()
        parts = attention_specs(model, prefix)
        self.tp = context.tp
        self.computes_backward = context.attention_backward
        self.head_size = model.kv_channels
        self.score_scale = 1.0 / math.sqrt(model.rotary_channels)
        self.has_rotary = has_rotary
        self.window = model.sliding_window
        self.norm = make_norm(parts["norm"], model, context)
        self.qkv = make_projections(model, {name: parts[name] for name in ("q", "k", "v")}, context)
        self.post_norm = model.post_norm
        self.q_norm: HeadNorm | AllHeadsNorm | None = None
        self.k_norm: HeadNorm | AllHeadsNorm | None = None
        if model.qk_layernorm:
            qk_norm = AllHeadsNorm if model.qk_layernorm_all_heads else HeadNorm
            self.q_norm, self.k_norm = (
                qk_norm(parts[name][0], model, context) for name in ("q_norm", "k_norm")
            )
        self.refine: Refinement | None = None
        if model.attention_order > 1:
            self.refine = Refinement(model, gate_specs(model, prefix), context)
        self.output: Linear | NexusRank | Pattention
        if model.projection == "pattention":
            self.output = Pattention({"output": parts["output"]}, model.attention_scale_slots, context)
        elif model.nexus_output_projection:
            self.output = NexusRank({"output": parts["output"]}, attention_widths(model), context)
        else:
            self.output = Linear(parts["output"][0], context)

    def forward(
        self,
        x_TBD: Tensor,
        tables: Tables,
        packing: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[T, B, D] -> [T, B, D]; with a cache the tokens follow those that it holds, and join them.

        `tables` are the rotary ones of the tokens.
        """
        x_TBD = self.tp.enter(x_TBD if self.post_norm else self.norm(x_TBD))
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in self.qkv(x_TBD))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turns = tables if self.has_rotary else None
        attend = partial(self._attend, packing)
        if self.refine is not None:
            q, k = self.refine(q, k, turns, attend, cache)
        q, k = rotate(q, turns), rotate(k, turns)
        v = v.permute(1, 2, 0, 3)
        if cache is not None:
            k, v = cache.extend("k", k), cache.extend("v", v)
        v = each_head(v, k.shape[1])
        mixed_TBW = attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        if isinstance(self.output, Linear):
            partial_sum = self.output(mixed_TBW)
        else:
            (mixed_TBW,) = self.tp.gather_features(mixed_TBW)
            (partial_sum,) = self.output(mixed_TBW)
        y_TBD = self.tp.leave(partial_sum)
        return self.norm(y_TBD) if self.post_norm else y_TBD

    def _attend(self, packing: Packing | None, q_BNTH: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention [B, N, T, H] of this layer's scale; of all earlier tokens where no mask is."""
        if packing is not None and packing.blocks is not None:
            return block_masked_attention(q_BNTH, k, v, packing.blocks, self.score_scale)
        mask = window_mask(packing, q_BNTH.shape[2], k.shape[2], self.window, k.device)
        is_square = q_BNTH.shape[1:3] == k.shape[1:3] and mask is None
        if self.computes_backward and is_square and k.shape[2] <= LONGEST and torch.is_grad_enabled():
            return causal_attention(q_BNTH, k, v, self.score_scale)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k,
            v,
            mask,
            is_causal=mask is None and q_BNTH.shape[2] > 1,
            scale=self.score_scale,
            enable_gqa=k.shape[1] < q_BNTH.shape[1],
        )
