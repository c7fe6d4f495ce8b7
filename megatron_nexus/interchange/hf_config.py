"""What the `config.json` of others says, as a configuration of ours; and every reason why there is none."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

from megatron_nexus.config.model_config import (
    INNER_BEFORE_IT_WAS_RECORDED,
    FeedForwardKind,
    InnerAttention,
    InnerNormScale,
    ModelConfig,
    Normalization,
    Projection,
)
from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.interchange.architecture import (
    LLAMA,
    MISTRAL,
    NEXUSFORMER,
    NEXUSFORMER_KEYS,
    OLMO2,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STOCK,
    JsonObject,
)

KINDS = {kind.model_type: kind for kind in (*STOCK, NEXUSFORMER)}
# What transformers' classes assume where a file says nothing.
ROPE_THETA, EPSILON, STD = 10000.0, 1e-6, 0.02
DEFAULTS: dict[object, JsonObject] = {
    MISTRAL.model_type: {"num_key_value_heads": 8, "sliding_window": 4096},
    QWEN2.model_type: {"num_key_value_heads": 32},
    QWEN3.model_type: {"head_dim": 128, "num_key_value_heads": 32},
    OLMO2.model_type: {"rms_norm_eps": 1e-5},
    SMOLLM3.model_type: {
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    NEXUSFORMER.model_type: {"nexus_inner_norm_scale": "hidden"},
}
"""What their classes assume that others do not. Of a key that is null all assume what Llama does."""
LLAMA3 = "llama3"
# The names of its numbers here, and there.
ROPE_SCALING = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
# What a Nexusformer's file chooses from.
CHOICES: dict[str, tuple[str, ...]] = {
    "projection": get_args(Projection),
    "feed_forward": get_args(FeedForwardKind),
    "normalization": get_args(Normalization),
    "nexus_inner_norm_scale": get_args(InnerNormScale),
}


def model_of(config: JsonObject) -> ModelConfig:
    """Return the model that a `config.json` describes.

    Raises ConfigError with every reason why this decoder does not compute it.
    """
    config = with_defaults(config)
    problems = list(_problems(config))
    raise_problems(problems)
    heads, kind = _whole(config, "num_attention_heads"), config["model_type"]
    groups = _whole(config, "num_key_value_heads", heads)
    size = _whole(config, "hidden_size") // heads
    rope = _rope(config)
    scaling: dict[str, Any] = {}
    if _rope_type(rope) == LLAMA3:
        scaling = {"use_rope_scaling": True, "original_max_position_embeddings": _original_length(config)}
        scaling |= {ours: _number(rope, theirs, 0.0) for ours, theirs in ROPE_SCALING.items()}
    model = ModelConfig(
        vocab_size=_whole(config, "vocab_size"),
        num_layers=_whole(config, "num_hidden_layers"),
        hidden_size=_whole(config, "hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups if groups != heads else 0,
        kv_channels=_whole(config, "head_dim", size),
        ffn_hidden_size=_whole(config, "intermediate_size"),
        projection="linear",
        qk_layernorm=kind in (QWEN3.model_type, OLMO2.model_type),
        qk_layernorm_all_heads=kind == OLMO2.model_type,
        post_norm=kind == OLMO2.model_type,
        add_qkv_bias=kind == QWEN2.model_type,
        sliding_window=_whole(config, "sliding_window", 0) if kind == MISTRAL.model_type else 0,
        no_rope_freq=_whole(config, "no_rope_layer_interval", 0) if kind == SMOLLM3.model_type else 0,
        nexus_m=0,
        nexus_a=0,
        rotary_base=_number(rope, "rope_theta", ROPE_THETA),
        **scaling,
        norm_epsilon=_number(config, "rms_norm_eps", EPSILON),
        init_method_std=_number(config, "initializer_range", STD),
    )
    if kind != NEXUSFORMER.model_type:
        return model
    own = {name: _own_value(config, key, name) for key, name in NEXUSFORMER_KEYS.items()}
    return replace(model, **own)


def _own_value(config: JsonObject, key: str, name: str) -> Any:
    """Return the field `name` of a Nexusformer, whose files of early versions lack some keys."""
    if name == "attention_inner":
        return _inner(config)
    default = getattr(ModelConfig, name)
    if isinstance(default, bool):
        return bool(config.get(key))
    if isinstance(default, int):
        return _whole(config, key, 1 if name == "attention_order" else 0)
    return config.get(key, default)


def _problems(config: JsonObject) -> Iterator[str]:
    kind = config.get("model_type")
    if kind not in KINDS:
        yield f"model_type {kind!r} cannot be imported: give a model of the types {', '.join(KINDS)}"
        return
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in sizes:
        if not isinstance(config.get(name), int) or _whole(config, name) < 1:
            yield f"{name} is {config.get(name)!r} in config.json: it must be a whole number above 0"
    for name, choices in CHOICES.items() if kind == NEXUSFORMER.model_type else ():
        if config.get(name) not in choices:
            yield f"{name} is {config.get(name)!r}, and known here are {', '.join(choices)}"
    inner, known = _inner(config), get_args(InnerAttention)
    if inner not in known:
        yield f"attention_inner is {inner!r}, and known here are {', '.join(known)}"
    rope = _rope(config)
    for name, expected in {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
    }.items():
        found = config.get(name, expected)
        if found != expected:
            yield f"{name} is {found!r}, and this decoder knows {expected!r} only: choose another model"
    if kind == LLAMA.model_type and config.get("sliding_window"):
        yield f"sliding_window {config['sliding_window']!r}: a Llama has none; choose another model"
    layers = config.get("layer_types")
    if isinstance(layers, list) and set(layers) - {"full_attention"}:
        others = ", ".join(sorted(map(str, set(layers) - {"full_attention"})))
        yield f"layer_types has {others}: all layers are alike here; choose another model"
    interval, turning = config.get("no_rope_layer_interval"), config.get("no_rope_layers")
    if kind == SMOLLM3.model_type and isinstance(turning, list):
        count = _whole(config, "num_hidden_layers")
        every = _whole(config, "no_rope_layer_interval")
        expected = [int(not every or (layer + 1) % every != 0) for layer in range(count)]
        if turning[:count] != expected:
            yield (
                f"no_rope_layers {turning}: known here is no_rope_layer_interval alone, which is {interval} "
                "and says otherwise: choose another model"
            )
    yield from _rope_problems(rope)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor: all channels of a head turn here; choose another model"


def _inner(config: JsonObject) -> str:
    """Return the form of inner attentions; early files of order 2 do not name the only form of their time."""
    higher = _whole(config, "attention_order", 1) > 1
    return str(config.get("attention_inner", INNER_BEFORE_IT_WAS_RECORDED if higher else "self"))


def _rope_problems(rope: JsonObject) -> Iterator[str]:
    kind = _rope_type(rope)
    if kind not in ("default", LLAMA3):
        yield (
            f"rope scaling {kind!r}: known here are default and {LLAMA3}; choose a model without it, or, "
            "where it only serves longer texts than those of training, take it out of config.json"
        )
    if kind == LLAMA3:
        for name in ROPE_SCALING.values():
            if not isinstance(rope.get(name), int | float):
                yield f"rope scaling {LLAMA3} without a number {name} in config.json: copy it again"


def with_defaults(config: JsonObject) -> JsonObject:
    """Return a `config.json` with the defaults of its class for missing keys."""
    return {**DEFAULTS.get(config.get("model_type"), {}), **config}


def _rope_type(rope: JsonObject) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def _original_length(config: JsonObject) -> int:
    """Return the context length before RoPE scaling, or the present one where none is given."""
    rope = _rope(config)
    for found in (config, rope):
        if found.get("original_max_position_embeddings") is not None:
            return _whole(found, "original_max_position_embeddings")
    return context_length(config)


def _rope(config: JsonObject) -> JsonObject:
    """Return the rotary settings: `rope_parameters`, or the keys of transformers 4."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope: JsonObject = dict(found) if isinstance(found, dict) else {"rope_type": found}
    return {"rope_theta": config.get("rope_theta", ROPE_THETA), **rope}


def _number(config: JsonObject, name: str, default: float) -> float:
    return float(_typed(config, name, default, float))


def _whole(config: JsonObject, name: str, default: int | None = None) -> int:
    return int(_typed(config, name, default, int))


def _typed(config: JsonObject, name: str, default: float | None, kind: Callable[[float], float]) -> float:
    """Return a number of a configuration; null means the default. Raises ConfigError for another type."""
    found = config.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or kind(found) != found:
        raise ConfigError(f"{name} is {found!r} in config.json: it must be a number")
    return found


def context_length(config: JsonObject) -> int:
    """Return the context length that the model was trained for, in tokens."""
    return _whole(config, "max_position_embeddings", 2048)


def ties_head(config: JsonObject) -> bool:
    """Return whether the head is the embedding."""
    return bool(with_defaults(config).get("tie_word_embeddings", False))
