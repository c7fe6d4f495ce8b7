# Copyright 2025 The megatron_nexus authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Nexusformer: a causal decoder whose queries, keys and values are nonlinear maps of three stages.

    nexus_rank(x) = gelu(gelu(x W_M) W_A) W_D                          (Nexusformer, equations 3 to 5)
    attention     = softmax(Q K^T / sqrt(H)) V, rotary positions       (equations 6 to 9)
    feed_forward  = (silu(x W_gate) * (x W_up)) W_down
    block         = x + attention(norm(x)), then x + feed_forward(norm(x))

The configuration may put other maps in their places: a linear one in addition to or instead of a Nexus-Rank,
Pattention (Tokenformer), attention of a higher order, LayerNorm without parameters.

B batch, T tokens, S tokens with those of the cache, D hidden, N heads, G heads of keys and values, H head
size, R <= H the channels of a head that turn. Sizes that have grown leave the function
as it was: norms divide by the base hidden size, scores by the root of the base head size, and the
slots of a Pattention are scaled by the root of their base number.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nexusformer import NexusformerConfig


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NexusformerRMSNorm(nn.Module):
    """y = x / sqrt(sum(x^2) / S + eps) * gain over a last axis of D, where S is D before growth."""

    def __init__(self, size: int, base_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        # As a mean over D: 1 / sqrt(sum / S + eps) = r / sqrt(sum / D + eps r^2) with r^2 = S / D.
        self.scale = math.sqrt(base_size / size)
        self.epsilon = epsilon * base_size / size

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gain = self.weight * self.scale if self.scale != 1.0 else self.weight
        return F.rms_norm(x, gain.shape, gain, self.epsilon)


class NexusformerLayerNorm(nn.Module):
    """y = (x - m) / sqrt(|x - m|^2 / S + eps), m the mean of the first S of D units: those before growth.

    Later units are scaled and counted as the others, but neither enter m nor have it subtracted.
    """

    def __init__(self, base_size: int, epsilon: float) -> None:
        super().__init__()
        self.base_size = base_size
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        base, size = self.base_size, x.shape[-1]
        if base == size:
            return F.layer_norm(x, (size,), eps=self.epsilon)
        old, new = wide(x).split([base, size - base], dim=-1)
        rest = torch.cat([old - old.mean(-1, keepdim=True), new], dim=-1)
        share = base / size
        return (F.rms_norm(rest, (size,), eps=self.epsilon * share) * math.sqrt(share)).to(x.dtype)


class NexusformerHeadRMSNorm(nn.Module):
    """y = x / sqrt(mean of the first R channels' squares + eps) * gain over the H channels of each head."""

    def __init__(self, size: int, counted: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.counted = counted
        self.epsilon = epsilon

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """[B, T, N, H] -> [B, T, N, H]."""
        if self.counted == x_BTNH.shape[-1]:
            return F.rms_norm(x_BTNH, self.weight.shape, self.weight, self.epsilon)
        mean = wide(x_BTNH[..., : self.counted]).square().mean(-1, keepdim=True)
        return (wide(x_BTNH) * (mean + self.epsilon).rsqrt()).to(x_BTNH.dtype) * self.weight


class NexusformerAllHeadsRMSNorm(nn.Module):
    """y = x / sqrt(mean of all channels' squares + eps) * gain over the channels of all heads together."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x_BTNH: Tensor) -> Tensor:
        """[B, T, N, H] -> [B, T, N, H]."""
        return F.rms_norm(x_BTNH.flatten(-2), self.weight.shape, self.weight, self.epsilon).view_as(x_BTNH)


class NexusRank(nn.Module):
    """Y = gelu(gelu(X W_M) W_A) W_D with the exact GELU, of the attention or the feed-forward."""

    def __init__(
        self, config: NexusformerConfig, inputs: int, outputs: int, feed_forward: bool = False
    ) -> None:
        super().__init__()
        if feed_forward:
            m, a = config.ffn_nexus_m, config.intermediate_size
            base = (config.base_ffn_nexus_m or m, config.base_intermediate_size or a)
        else:
            m, a = config.nexus_m, config.nexus_a
            base = (config.base_nexus_m or m, config.base_nexus_a or a)
        self.w_m = nn.Linear(inputs, m, bias=False)
        self.w_a = nn.Linear(m, a, bias=False)
        self.w_d = nn.Linear(a, outputs, bias=False)
        # They do not follow the width of what they scale, which may grow.
        self.scale_m: float | None = None
        self.scale_a: float | None = None
        if config.nexus_inner_norm:
            if config.nexus_inner_norm_scale == "hidden":
                base = (config.norm_size, config.norm_size)
            self.scale_m, self.scale_a = map(math.sqrt, base)

    def activation(self, h: Tensor, scale: float | None) -> Tensor:
        """gelu(h), or gelu(h / (||h||_2 + 1e-5) * scale) with an inner norm."""
        if scale is not None:
            length = wide(h).square().sum(-1, keepdim=True).clamp_min(1e-30).sqrt()
            h = (wide(h) * (scale / (length + 1e-5))).to(h.dtype)
        return F.gelu(h)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        h_m = self.activation(self.w_m(x), self.scale_m)
        y: Tensor = self.w_d(self.activation(self.w_a(h_m), self.scale_a))
        return y


class LinearNexusRank(NexusRank):
    """Y = X W + gelu(gelu(X W_M) W_A) W_D: what a trained linear projection becomes."""

    def __init__(self, config: NexusformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(config, inputs, outputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if config.qkv_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias) + super().forward(x)


class Pattention(nn.Module):
    """Y = gelu(A / ||A||_2 * tau) V, A = X K^T: attention over parameter tokens (Tokenformer).

    tau is the root of the number of slots before growth. Scores of zeros have no direction: they give zero.
    """

    def __init__(self, inputs: int, outputs: int, slots: int, base_slots: int) -> None:
        super().__init__()
        self.keys = nn.Linear(inputs, slots, bias=False)
        self.values = nn.Linear(slots, outputs, bias=False)
        self.scale = math.sqrt(base_slots)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        scores = self.keys(x)
        squares = wide(scores).square().sum(-1, keepdim=True)
        empty = squares < 1e-20
        factor = squares.masked_fill(empty, 1.0).rsqrt().masked_fill(empty, 0.0) * self.scale
        y: Tensor = self.values(F.gelu((scores * factor).to(x.dtype)))
        return y


def make_projection(config: NexusformerConfig, inputs: int, outputs: int) -> nn.Module:
    """What computes queries, keys or values."""
    if config.projection == "linear":
        return nn.Linear(inputs, outputs, bias=config.qkv_bias)
    if config.projection == "pattention":
        slots = config.pattention_slots
        return Pattention(inputs, outputs, slots, config.base_pattention_slots or slots)
    kind = NexusRank if config.projection == "nexus" else LinearNexusRank
    return kind(config, inputs, outputs)


def rotary_tables(
    config: NexusformerConfig, positions_BT: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, R / 2] of the angles t * base^(-2 i / R), rounded once to `dtype`."""
    assert config.rope_parameters is not None, "filled in by the configuration"
    # Apple's devices know no float64.
    exact = torch.float32 if positions_BT.device.type == "mps" else torch.float64
    size = config.rotary_channels
    exponents = torch.arange(0, size, 2, dtype=exact, device=positions_BT.device) / size
    frequencies = config.rope_parameters["rope_theta"] ** -exponents
    if config.rope_parameters["rope_type"] == "llama3":
        rope = config.rope_parameters
        turns = rope["original_max_position_embeddings"] * frequencies / (2.0 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / rope["factor"])
    angles = positions_BT[:, None, :, None].to(exact) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R / 2) of each head's first R channels."""
    half = cos.shape[-1]
    first, second, rest = x_BNTH.split((half, half, x_BNTH.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Q [B, N, T, H], K and V [B, G, S, H], additive mask -> [B, T, N, H] and the weights [B, N, T, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(wide(scores).softmax(-1).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NexusformerHeadGate(nn.Module):
    """x + a (y - x) with a learnt `a` of each head, 0 at first."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self, x_BNTH: Tensor, y_BNTH: Tensor) -> Tensor:
        """Both [B, N, T, H] -> [B, N, T, H]."""
        return x_BNTH + self.weight[:, None, None] * (y_BNTH - x_BNTH)


class NexusformerAttention(nn.Module):
    """x -> attention(x), without norm and residual."""

    def __init__(self, config: NexusformerConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None, "filled in by the configuration"
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = 1.0 / math.sqrt(config.rotary_channels)
        self.is_causal = True
        interval = config.no_rope_layer_interval
        self.has_rotary = not interval or (layer_idx + 1) % interval != 0
        self.sliding_window = config.sliding_window
        self.order = config.attention_order
        self.inner = config.attention_inner
        self.counted = config.rotary_channels
        self.num_hidden_layers = config.num_hidden_layers
        if self.order > 1:
            self.num_key_value_groups = 1  # inner attentions differ in it: keys are repeated before
        self.q_gate: nn.Module | None = None
        self.k_gate: nn.Module | None = None
        if config.attention_gate:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            self.q_gate = NexusformerHeadGate(heads)
            self.k_gate = NexusformerHeadGate(groups if self.inner == "self" else heads)
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = make_projection(config, hidden, width)
        self.k_proj = make_projection(config, hidden, key_width)
        self.v_proj = make_projection(config, hidden, key_width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            sizes = (config.head_dim, config.rotary_channels, config.rms_norm_eps)
            self.q_norm, self.k_norm = NexusformerHeadRMSNorm(*sizes), NexusformerHeadRMSNorm(*sizes)
        if config.qk_norm and config.qk_norm_all_heads:
            self.q_norm = NexusformerAllHeadsRMSNorm(width, config.rms_norm_eps)
            self.k_norm = NexusformerAllHeadsRMSNorm(key_width, config.rms_norm_eps)
        self.o_proj: nn.Module
        if config.projection == "pattention":
            self.o_proj = make_projection(config, width, hidden)
        elif config.nexus_output_projection:
            self.o_proj = NexusRank(config, width, hidden)
        else:
            self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        tables: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T, D], and the weights where the implementation gives them."""
        q, k, v = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if not self.has_rotary:
            tables = (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

        def kept(place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            """With those of earlier tokens, which the cache keeps at this layer's `place`."""
            if past_key_values is None:
                return keys, values
            return past_key_values.update(keys, values, self.layer_idx + place * self.num_hidden_layers)

        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        settings = {"scaling": self.scaling, "sliding_window": self.sliding_window, **kwargs}
        attend = partial(interface, self, attention_mask=attention_mask, **settings)
        if self.order > 1:
            q, k = self.refined(q, k, tables, attend, kept)
        k, v = kept(0, rotate(k, *tables), v)
        if self.order > 1:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        mixed_BTNH, weights = attend(rotate(q, *tables), k, v)
        return self.o_proj(mixed_BTNH.flatten(2)), weights

    @staticmethod
    def gated(gate: nn.Module | None, x_BNTH: Tensor, read_BNTH: Tensor) -> Tensor:
        """What a gate leaves of what was read, all of it without one."""
        if gate is None:
            return read_BNTH
        result: Tensor = gate(x_BNTH, read_BNTH)
        return result

    def refined(
        self,
        q: Tensor,
        k: Tensor,
        tables: tuple[Tensor, Tensor],
        attend: Callable[..., tuple[Tensor, Tensor | None]],
        kept: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, N, T, H] and keys of a higher order, read from earlier ones by inner attentions.

        self     Q_m = softmax(Q_(m-1) Q_(m-1)^T / sqrt(H)) Q of base channels; K_m alike, [B, G, T, H]
        cross    A_1 = softmax(Q K^T / sqrt(H)), Q_m = A_(m-1) Q, K_m = A_(m-1) K, [B, N, T, H]
        """

        def for_each_head(x_BGTH: Tensor) -> Tensor:
            return x_BGTH.repeat_interleave(q.shape[1] // x_BGTH.shape[1], dim=1)

        q_values, k_values = kept(1, q, k)
        first_q, first_k = q, k
        if self.inner == "cross":
            first_k, k_values = for_each_head(k), for_each_head(k_values)
        for level in range(1, self.order):
            q, k = rotate(q, *tables), rotate(k, *tables)
            if self.inner == "self":
                q_keys, k_keys = kept(level + 1, q, k)
                q, k = (F.pad(x[..., : self.counted], (0, self.head_dim - self.counted)) for x in (q, k))
            else:  # the same scores for both
                keys, _ = kept(level + 1, k, k[..., :0])
                q_keys = k_keys = for_each_head(keys)
                k = q
            q = self.gated(self.q_gate, first_q, attend(q, q_keys, q_values)[0].transpose(1, 2))
            k = self.gated(self.k_gate, first_k, attend(k, k_keys, k_values)[0].transpose(1, 2))
        return q, k


class NexusformerMLP(nn.Module):
    """SwiGLU: x -> (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, config: NexusformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return y


def make_feed_forward(config: NexusformerConfig) -> nn.Module:
    """The map between norm and residual."""
    if config.feed_forward == "swiglu":
        return NexusformerMLP(config)
    hidden, slots = config.hidden_size, config.intermediate_size
    if config.feed_forward == "nexus":
        return NexusRank(config, hidden, hidden, feed_forward=True)
    return Pattention(hidden, hidden, slots, config.base_intermediate_size or slots)


def make_norm(config: NexusformerConfig) -> nn.Module:
    """A norm of the residual stream."""
    if config.normalization == "NonParametricLayerNorm":
        return NexusformerLayerNorm(config.norm_size, config.rms_norm_eps)
    return NexusformerRMSNorm(config.hidden_size, config.norm_size, config.rms_norm_eps)


class NexusformerDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with post-norm the norms are outside."""

    def __init__(self, config: NexusformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = NexusformerAttention(config, layer_idx)
        self.mlp = make_feed_forward(config)
        self.post_norm = config.post_norm
        self.post_attention_layernorm = make_norm(config)
        if config.post_norm:
            self.post_feedforward_layernorm = make_norm(config)
        else:
            self.input_layernorm = make_norm(config)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y_BTD: Tensor
        if self.post_norm:
            x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(x_BTD, **kwargs)[0])
            y_BTD = x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD))
            return y_BTD
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), **kwargs)[0]
        y_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return y_BTD


class NexusformerPreTrainedModel(PreTrainedModel):
    """What transformers is to know of the model."""

    config: NexusformerConfig
    config_class = NexusformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NexusformerDecoderLayer"]  # noqa: RUF012 - transformers reads it so
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": NexusformerDecoderLayer,
        "attentions": NexusformerAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        """Random values of a model that is not loaded: transformers knows what is not a matrix of its own."""
        super()._init_weights(module)
        if isinstance(module, LinearNexusRank):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, NexusformerHeadGate):
            init.zeros_(module.weight)


class NexusformerModel(NexusformerPreTrainedModel):
    """Token ids -> the last hidden state, normed."""

    def __init__(self, config: NexusformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            NexusformerDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids [B, T], or their embeddings [B, T, D] -> hidden states [B, T, D].

        `attention_mask` [B, S] is 0 where a token is padding, on whichever side. Positions that are not given
        count the tokens that are none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and self.config.attention_order > 1:
            self.make_room(past_key_values)
        batch, tokens = x_BTD.shape[:2]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            if attention_mask is not None and attention_mask.shape == (batch, seen + tokens):
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]
            else:
                position_ids = torch.arange(seen, seen + tokens, device=x_BTD.device)[None]
        make_mask = create_causal_mask
        if self.config.sliding_window is not None:
            make_mask = create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = rotary_tables(self.config, position_ids, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(
                x_BTD,
                tables=tables,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def make_room(self, cache: Cache) -> None:
        """Places for what inner attentions read of earlier tokens, as many again as layers for each order.

        Raises ValueError: only a DynamicCache can have them.
        """
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"attention of a higher order needs a DynamicCache, not a {type(cache).__name__}"
            )
        places = (self.config.attention_order + 1) * self.config.num_hidden_layers
        cache.layers.extend(DynamicLayer() for _ in range(places - len(cache.layers)))


class NexusformerForCausalLM(NexusformerPreTrainedModel, GenerationMixin):
    """Token ids -> logits of the next token."""

    def __init__(self, config: NexusformerConfig) -> None:
        super().__init__(config)
        self.model = NexusformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary], of the last `logits_to_keep` tokens only where that is not 0.

        With `labels` [B, T], the ids again with -100 where none counts, the loss too, in nats per token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["NexusformerForCausalLM", "NexusformerModel", "NexusformerPreTrainedModel"]
