"""The configuration of the model: its logical sizes and what its layers compute. A section of `RunConfig`."""

from dataclasses import dataclass
from typing import Literal

from megatron_nexus.config.config_field import config_field

Projection = Literal["nexus", "linear", "linear_nexus", "pattention"]
InnerAttention = Literal["self", "cross"]
FeedForwardKind = Literal["swiglu", "pattention", "nexus"]
InnerNormScale = Literal["hidden", "width"]
Normalization = Literal["RMSNorm", "NonParametricLayerNorm"]

MOST_LAYERS = 10_000
"""A model is described layer by layer before it is refused for its size."""

INNER_BEFORE_IT_WAS_RECORDED: InnerAttention = "cross"
"""The inner form of a model of a higher order whose saved configuration has no `attention_inner`."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: logical sizes only; nothing here needs to divide by a parallel size except the heads."""

    vocab_size: int = config_field(4096, "tokens in the vocabulary", positive=True, grows=True)
    num_layers: int = config_field(4, "decoder blocks", positive=True, maximum=MOST_LAYERS, grows=True)
    hidden_size: int = config_field(128, "width D of the residual stream", positive=True, grows=True)
    num_attention_heads: int = config_field(4, "attention heads", positive=True, grows=True)
    num_query_groups: int = config_field(
        0,
        "groups of heads that share keys and values (grouped-query attention); 0: each head has its own",
        grows=True,
    )
    attention_order: int = config_field(
        1,
        "1: standard attention; 2 and above: queries and keys refined by inner attentions, no new weights",
        positive=True,
        maximum=MOST_LAYERS,
        grows=True,
    )
    attention_inner: InnerAttention = config_field(
        "self",
        "scores of the inner attentions from order 2 on: self (queries with queries, keys with keys) or "
        "cross (queries with keys, for both)",
    )
    attention_gate: bool = config_field(
        False,
        "learnt gate of each head on its refined queries and on its keys, 0 at first: starts as order 1",
    )
    kv_channels: int = config_field(
        32, "size of one head; heads x this is the attention width", "--head-dim", positive=True, grows=True
    )
    feed_forward: FeedForwardKind = config_field(
        "swiglu",
        "swiglu, pattention (Tokenformer), or nexus (a Nexus-Rank, as in the authors' released code)",
    )
    ffn_hidden_size: int = config_field(
        344,
        "width of the SwiGLU feed-forward, slots of the Pattention, or second width of the Nexus-Rank",
        positive=True,
        grows=True,
    )
    ffn_nexus_m: int = config_field(0, "first width of a Nexus-Rank feed-forward", grows=True)
    projection: Projection = config_field(
        "nexus",
        "what computes Q, K and V: nexus (Nexus-Rank), linear (a matrix each), linear_nexus (their sum), or "
        "pattention (Tokenformer), which computes the attention's output as well",
    )
    pattention_slots: int = config_field(
        0, "parameter tokens of each Pattention of the attention: Q, K, V and output", grows=True
    )
    qk_layernorm: bool = config_field(
        False, "RMSNorm of each head's query and key before the rotary embedding"
    )
    qk_layernorm_all_heads: bool = config_field(
        False, "--qk-layernorm over the channels of all heads at once, as OLMo 2 has it"
    )
    post_norm: bool = config_field(
        False, "norms of what attention and feed-forward give, not of what they read, as OLMo 2 has them"
    )
    add_qkv_bias: bool = config_field(False, "biases of the linear Q, K and V projections, as Qwen2 has them")
    sliding_window: int = config_field(
        0, "tokens that each token sees, itself included, as Mistral has it; 0: all before it"
    )
    nexus_m: int = config_field(160, "first width M of each Nexus-Rank projection, D < M < A", grows=True)
    nexus_a: int = config_field(192, "second width A of each Nexus-Rank projection", grows=True)
    nexus_inner_norm: bool = config_field(False, "gain-free norm before each GELU of a Nexus-Rank")
    nexus_inner_norm_scale: InnerNormScale = config_field(
        "hidden",
        "length that the inner norm gives: the square root of the hidden size, or of the normalised width "
        "(as in the authors' released code); growth keeps it",
    )
    nexus_output_projection: bool = config_field(
        False, "Nexus-Rank for the attention's output projection too"
    )
    base_hidden_size: int = config_field(
        0, "hidden size before it grew, which the norms' means keep to; 0: it has not grown"
    )
    base_nexus_m: int = config_field(
        0, "--nexus-m before it grew, whose root is the inner norm's scale; 0: it has not grown"
    )
    base_nexus_a: int = config_field(
        0, "--nexus-a before it grew, whose root is the inner norm's scale; 0: it has not grown"
    )
    base_ffn_nexus_m: int = config_field(
        0, "--ffn-nexus-m before it grew, whose root is the inner norm's scale; 0: it has not grown"
    )
    base_pattention_slots: int = config_field(
        0, "--pattention-slots before they grew, whose root scales scores; 0: they have not grown"
    )
    base_ffn_hidden_size: int = config_field(
        0,
        "--ffn-hidden-size of a Pattention or Nexus-Rank feed-forward before it grew, whose root scales; "
        "0: it has not grown",
    )
    base_kv_channels: int = config_field(
        0, "head size before it grew: these channels turn and its root scales scores; 0: it has not grown"
    )
    rotary_base: float = config_field(10000.0, "base of the rotary position embedding", positive=True)
    use_rope_scaling: bool = config_field(
        False, "slow rotary frequencies divided by --rope-scaling-factor, as Llama 3.1 and later do"
    )
    rope_scaling_factor: float = config_field(
        8.0, "what frequencies are divided by that turn too slowly", positive=True
    )
    rope_low_freq_factor: float = config_field(
        1.0,
        "turns within --original-max-position-embeddings up to which a frequency is divided whole",
        positive=True,
    )
    rope_high_freq_factor: float = config_field(
        4.0,
        "turns within --original-max-position-embeddings from which a frequency is unchanged",
        positive=True,
    )
    original_max_position_embeddings: int = config_field(
        8192,
        "context length before RoPE was scaled, for --use-rope-scaling",
        positive=True,
    )
    no_rope_freq: int = config_field(
        0, "every Nth layer has no rotary embedding: 4 for SmolLM3; 0: all layers have it"
    )
    normalization: Normalization = config_field(
        "RMSNorm", "RMSNorm with a gain, or NonParametricLayerNorm (Tokenformer): without gain and bias"
    )
    norm_epsilon: float = config_field(1e-6, "epsilon of the norms", positive=True)
    init_method_std: float = config_field(0.02, "standard deviation of the initial weights", positive=True)

    @property
    def attention_width(self) -> int:
        """Heads x head size: the width of Q, K, V and of the attention's output."""
        return self.num_attention_heads * self.kv_channels

    @property
    def query_groups(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def key_width(self) -> int:
        """Heads of keys and values x head size: the width of K and of V."""
        return self.query_groups * self.kv_channels

    def has_rotary(self, layer: int) -> bool:
        """Return whether the queries and keys of a layer, counted from 0, turn with their positions."""
        return not self.no_rope_freq or (layer + 1) % self.no_rope_freq != 0

    @property
    def inner_attention_width(self) -> int:
        """Heads x head size of all inner attentions together: two at each order above the first."""
        keys = self.key_width if self.attention_inner == "self" else self.attention_width
        return (self.attention_order - 1) * (self.attention_width + keys)

    @property
    def has_nexus(self) -> bool:
        """Whether M and A are widths of this model."""
        return self.projection in ("nexus", "linear_nexus")

    @property
    def norm_size(self) -> int:
        """Divisor of a norm's mean: the hidden size before growth, which growth keeps."""
        return self.base_hidden_size or self.hidden_size

    @property
    def attention_scale_slots(self) -> int:
        """Slots of each Pattention of the attention when its scale was set, so that growth keeps it."""
        return self.base_pattention_slots or self.pattention_slots

    @property
    def feed_forward_scale_slots(self) -> int:
        """Slots of a Pattention feed-forward when its scale was set, so that growth keeps it."""
        return self.base_ffn_hidden_size or self.ffn_hidden_size

    @property
    def rotary_channels(self) -> int:
        """The first channels of each head, which rotate: the head size before growth."""
        return self.base_kv_channels or self.kv_channels
