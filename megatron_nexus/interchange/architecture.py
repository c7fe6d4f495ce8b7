"""Which class of transformers computes a model, and what its `config.json` says.

Models of the shape of Llama, Mistral, Qwen2, Qwen3, OLMo 2 and SmolLM3 become transformers' own classes;
all others, and those that have grown in a way that these know nothing of, in `modeling_nexusformer.py`, which
goes with the files.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.config.model_config import ModelConfig

JsonObject = dict[str, object]
REMOTE_CODE = tuple(
    Path(__file__).with_name("remote_code") / name
    for name in ("configuration_nexusformer.py", "modeling_nexusformer.py")
)


@dataclass(frozen=True)
class Architecture:
    """A class of transformers: the name of its kind, its own, and the files that define it."""

    model_type: str
    class_name: str
    files: tuple[Path, ...] = ()


NEXUSFORMER = Architecture("nexusformer", "NexusformerForCausalLM", REMOTE_CODE)
LLAMA = Architecture("llama", "LlamaForCausalLM")
MISTRAL = Architecture("mistral", "MistralForCausalLM")
QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM")
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM")
OLMO2 = Architecture("olmo2", "Olmo2ForCausalLM")
SMOLLM3 = Architecture("smollm3", "SmolLM3ForCausalLM")
STOCK = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, SMOLLM3)
"""transformers' own; each but Llama has one more thing in addition: see `architecture_of`."""

_SAME_KEYS = (
    *("attention_order", "attention_inner", "attention_gate", "projection", "pattention_slots"),
    *("feed_forward", "normalization", "post_norm", "sliding_window", "nexus_m", "nexus_a"),
    *("nexus_inner_norm", "nexus_inner_norm_scale", "ffn_nexus_m", "nexus_output_projection"),
    *("base_hidden_size", "base_pattention_slots", "base_nexus_m", "base_nexus_a", "base_ffn_nexus_m"),
)
NEXUSFORMER_KEYS = {name: name for name in _SAME_KEYS} | {
    "qk_norm": "qk_layernorm",
    "qk_norm_all_heads": "qk_layernorm_all_heads",
    "qkv_bias": "add_qkv_bias",
    "no_rope_layer_interval": "no_rope_freq",
    "base_head_dim": "base_kv_channels",
    "base_intermediate_size": "base_ffn_hidden_size",
}
"""The keys that the `config.json` of a Nexusformer has besides a Llama's, and the fields of ModelConfig."""


def architecture_of(model: ModelConfig, origin: str = "") -> Architecture:
    """Return the class that computes `model`; `origin` is the model_type that it was imported as, or ""."""
    grown = model.base_hidden_size or model.base_kv_channels
    plain = (model.projection, model.feed_forward, model.normalization) == ("linear", "swiglu", "RMSNorm")
    if not plain or grown or model.attention_order > 1:
        return NEXUSFORMER
    features = {
        MISTRAL: model.sliding_window > 0,
        QWEN2: model.add_qkv_bias,
        QWEN3: model.qk_layernorm and not model.qk_layernorm_all_heads,
        OLMO2: model.post_norm or model.qk_layernorm_all_heads,
        SMOLLM3: model.no_rope_freq > 0,
    }
    kinds = [kind for kind, is_there in features.items() if is_there]
    half_olmo2 = kinds == [OLMO2] and not (model.post_norm and model.qk_layernorm_all_heads)
    if len(kinds) > 1 or half_olmo2:
        return NEXUSFORMER
    if kinds:
        return kinds[0]
    if origin == MISTRAL.model_type:
        return MISTRAL  # without a window
    # transformers refuses a Llama whose hidden size is not a multiple of its heads.
    return NEXUSFORMER if model.hidden_size % model.num_attention_heads else LLAMA


def rope_json(model: ModelConfig) -> JsonObject:
    """Return the `rope_parameters` of a model."""
    if not model.use_rope_scaling:
        return {"rope_type": "default", "rope_theta": model.rotary_base}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rotary_base,
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_freq_factor,
        "high_freq_factor": model.rope_high_freq_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings,
    }


def config_json(
    model: ModelConfig,
    kind: Architecture,
    max_positions: int,
    dtype: str,
    end_token: int | None,
    tied: bool = False,
    begin_token: int | None = None,
) -> JsonObject:
    """Return the contents of `config.json` for a model that was trained on up to `max_positions` tokens.

    `dtype` is that of the files, "float32" or "bfloat16". The tokens are those that begin a text and end a
    document, None where the tokenizer is not known. `tied`: the head is the embedding.
    """
    rope = rope_json(model)
    record: JsonObject = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers 4 calls it
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "rope_theta": model.rotary_base,  # where transformers 4 and what bundles it look for it
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": tied,
        "bos_token_id": begin_token,
        "eos_token_id": end_token,
        "pad_token_id": end_token,
    }
    if model.use_rope_scaling:  # as transformers 4 calls them
        record["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if kind is QWEN2:
        record["use_sliding_window"] = False
    if kind is SMOLLM3:
        record |= {
            "no_rope_layer_interval": model.no_rope_freq,
            "no_rope_layers": [int(model.has_rotary(layer)) for layer in range(model.num_layers)],
            "use_sliding_window": False,
        }
    if kind is NEXUSFORMER:
        record |= {
            "auto_map": {
                "AutoConfig": "configuration_nexusformer.NexusformerConfig",
                "AutoModel": "modeling_nexusformer.NexusformerModel",
                "AutoModelForCausalLM": "modeling_nexusformer.NexusformerForCausalLM",
            },
            **{key: getattr(model, name) for key, name in NEXUSFORMER_KEYS.items()},
        }
    if kind in (MISTRAL, NEXUSFORMER):
        record["sliding_window"] = model.sliding_window or None
    return record
