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
"""Configuration of a Nexusformer: a decoder whose queries, keys and values are Nexus-Rank projections."""

from typing import Any, ClassVar

from transformers import __version__

try:
    from transformers import PreTrainedConfig
    from transformers.utils.output_capturing import capture_outputs  # noqa: F401 - what the model needs
except ImportError as error:
    raise ImportError(
        f"the code of this Nexusformer needs transformers 5.23 or newer, and this is {__version__}: "
        "pip install -U 'transformers>=5.23'"
    ) from error

CHOICES = {
    "projection": ("nexus", "linear", "linear_nexus", "pattention"),
    "feed_forward": ("swiglu", "pattention", "nexus"),
    "nexus_inner_norm_scale": ("hidden", "width"),
    "normalization": ("RMSNorm", "NonParametricLayerNorm"),
    "attention_inner": ("self", "cross"),
}


class NexusformerConfig(PreTrainedConfig):
    """Sizes and options; `modeling_nexusformer.py` has the equations.

    Fields that transformers' own decoders have mean here what they mean there. The others:

    projection: what computes queries, keys and values: "nexus" (Nexus-Rank), "linear" (a matrix each),
        "linear_nexus" (the sum of both) or "pattention" (Tokenformer), which computes the output as well.
    pattention_slots: parameter tokens of each of these Pattentions.
    feed_forward: "swiglu", "pattention" of intermediate_size slots, or "nexus", a Nexus-Rank of widths
        ffn_nexus_m and intermediate_size.
    normalization: "RMSNorm", or "NonParametricLayerNorm" without gain and bias.
    attention_order: 1 is standard attention; above, inner attentions refine queries and keys.
    attention_inner: whether these score queries with queries and keys with keys ("self"), or both by queries
        with keys ("cross", which files that say nothing mean).
    attention_gate: a learnt gate of each head on what refines its queries, and on what refines its keys.
    nexus_m, nexus_a: the two inner widths of a Nexus-Rank projection.
    nexus_inner_norm: a norm without gain before each GELU of a Nexus-Rank.
    nexus_inner_norm_scale: the length it gives: the root of the "hidden" size, or of the normalised "width".
    nexus_output_projection: Nexus-Rank for the attention's output projection too.
    qk_norm: RMSNorm of each head's query and key before the rotary embedding.
    qk_norm_all_heads: that norm over the channels of all heads at once.
    post_norm: norms of what attention and feed-forward give, not of what they read.
    qkv_bias: biases of linear queries, keys and values.
    sliding_window: tokens that each token sees, itself included; None: all before it.
    no_rope_layer_interval: every such layer has no rotary embedding; 0: all have it.
    base_hidden_size: hidden size before the model grew, which the norms keep to; 0: it has not grown.
    base_pattention_slots, base_intermediate_size, base_nexus_m, base_nexus_a, base_ffn_nexus_m: slots and
        widths before they grew, whose roots scale; 0: they have not grown.
    base_head_dim: head size before the heads grew: as many channels turn, and scores are scaled by its root;
        0: they have not grown.
    """

    model_type = "nexusformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int = 64
    attention_order: int = 1
    attention_inner: str = "cross"
    attention_gate: bool = False
    projection: str = "nexus"
    pattention_slots: int = 0
    feed_forward: str = "swiglu"
    normalization: str = "RMSNorm"
    nexus_m: int = 780
    nexus_a: int = 960
    nexus_inner_norm: bool = False
    nexus_inner_norm_scale: str = "hidden"
    ffn_nexus_m: int = 0
    nexus_output_projection: bool = False
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    post_norm: bool = False
    qkv_bias: bool = False
    sliding_window: int | None = None
    no_rope_layer_interval: int = 0
    base_hidden_size: int = 0
    base_head_dim: int = 0
    base_pattention_slots: int = 0
    base_intermediate_size: int = 0
    base_nexus_m: int = 0
    base_nexus_a: int = 0
    base_ffn_nexus_m: int = 0
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields. Raises ValueError where the model does not exist."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.rope_parameters["rope_type"] not in ("default", "llama3"):
            raise ValueError(f"rope_type {self.rope_parameters['rope_type']!r} is none of default, llama3")
        if self.tie_word_embeddings:
            raise ValueError("a Nexusformer's head is a matrix of its own: tie_word_embeddings must be false")

    @property
    def norm_size(self) -> int:
        """The number that a norm's mean divides by: the hidden size before growth."""
        return self.base_hidden_size or self.hidden_size

    @property
    def rotary_channels(self) -> int:
        """Channels of each head that turn, the first ones: the head size before growth."""
        return self.base_head_dim or self.head_dim


__all__ = ["NexusformerConfig"]
