"""Which class of transformers computes a model, and what its `config.json` says.

Models of the shape of Llama and Qwen3 are told in transformers' own classes; all others, and those that have
grown in a way that these know nothing of, in `modeling_nexusformer.py`, which goes with the files.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.config.run_config import ModelConfig

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
QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM")


def architecture_of(model: ModelConfig) -> Architecture:
    """The class that computes `model`."""
    grown = model.base_hidden_size or model.base_kv_channels
    plain = (model.projection, model.feed_forward, model.normalization) == ("linear", "swiglu", "RMSNorm")
    if not plain or grown or model.attention_order > 1:
        return NEXUSFORMER
    if model.qk_layernorm:
        return QWEN3
    # transformers refuses a Llama whose hidden size is no multiple of its heads.
    return NEXUSFORMER if model.hidden_size % model.num_attention_heads else LLAMA


def config_json(model: ModelConfig, max_positions: int, dtype: str, end_token: int | None) -> JsonObject:
    """The contents of `config.json`.

    Args:
        model: its sizes.
        max_positions: tokens of the longest text that it was trained on.
        dtype: of the weights in the files, "float32" or "bfloat16".
        end_token: the id that ends a document, where the tokenizer is known.
    """
    kind = architecture_of(model)
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,  # where transformers 4 and what bundles it look for it
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end_token,
        "pad_token_id": end_token,
    }
    if kind is NEXUSFORMER:
        record |= {
            "auto_map": {
                "AutoConfig": "configuration_nexusformer.NexusformerConfig",
                "AutoModel": "modeling_nexusformer.NexusformerModel",
                "AutoModelForCausalLM": "modeling_nexusformer.NexusformerForCausalLM",
            },
            "attention_order": model.attention_order,
            "attention_inner": model.attention_inner,
            "attention_gate": model.attention_gate,
            "projection": model.projection,
            "pattention_slots": model.pattention_slots,
            "feed_forward": model.feed_forward,
            "normalization": model.normalization,
            "qk_norm": model.qk_layernorm,
            "nexus_m": model.nexus_m,
            "nexus_a": model.nexus_a,
            "nexus_inner_norm": model.nexus_inner_norm,
            "nexus_inner_norm_scale": model.nexus_inner_norm_scale,
            "ffn_nexus_m": model.ffn_nexus_m,
            "nexus_output_projection": model.nexus_output_projection,
            "base_hidden_size": model.base_hidden_size,
            "base_head_dim": model.base_kv_channels,
            "base_pattention_slots": model.base_pattention_slots,
            "base_intermediate_size": model.base_ffn_hidden_size,
            "base_nexus_m": model.base_nexus_m,
            "base_nexus_a": model.base_nexus_a,
            "base_ffn_nexus_m": model.base_ffn_nexus_m,
        }
    return record
