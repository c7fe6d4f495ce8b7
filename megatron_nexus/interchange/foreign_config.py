"""What the `config.json` of others says, as a configuration of ours; and every reason why there is none."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

from megatron_nexus.config.run_config import (
    INNER_BEFORE_IT_WAS_RECORDED,
    FeedForwardKind,
    InnerAttention,
    InnerNormScale,
    ModelConfig,
    Normalization,
    Projection,
)
from megatron_nexus.errors import ConfigError
from megatron_nexus.interchange.architecture import LLAMA, NEXUSFORMER, QWEN3, JsonObject

KINDS = {kind.model_type: kind for kind in (LLAMA, QWEN3, NEXUSFORMER)}
# What transformers' classes assume where a file says nothing.
ROPE_THETA, EPSILON, STD = 10000.0, 1e-6, 0.02
QWEN3_HEAD = 128
# What a Nexusformer's file chooses from.
CHOICES: dict[str, tuple[str, ...]] = {
    "projection": get_args(Projection),
    "feed_forward": get_args(FeedForwardKind),
    "normalization": get_args(Normalization),
}
# The names of its sizes here, and there.
NEXUS_SIZES = {
    "nexus_m": "nexus_m",
    "nexus_a": "nexus_a",
    "pattention_slots": "pattention_slots",
    "base_hidden_size": "base_hidden_size",
    "base_kv_channels": "base_head_dim",
    "base_pattention_slots": "base_pattention_slots",
    "ffn_nexus_m": "ffn_nexus_m",
    "base_nexus_m": "base_nexus_m",
    "base_nexus_a": "base_nexus_a",
    "base_ffn_nexus_m": "base_ffn_nexus_m",
    "base_ffn_hidden_size": "base_intermediate_size",
}


def model_of(config: JsonObject) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises ConfigError with every reason why this decoder does not compute it.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigError(problems)
    heads, kind = _whole(config, "num_attention_heads"), config["model_type"]
    groups = _whole(config, "num_key_value_heads", heads)
    size = QWEN3_HEAD if kind == QWEN3.model_type else _whole(config, "hidden_size") // heads
    model = ModelConfig(
        vocab_size=_whole(config, "vocab_size"),
        num_layers=_whole(config, "num_hidden_layers"),
        hidden_size=_whole(config, "hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups if groups != heads else 0,
        kv_channels=_whole(config, "head_dim", size),
        ffn_hidden_size=_whole(config, "intermediate_size"),
        projection="linear",
        qk_layernorm=kind == QWEN3.model_type,
        nexus_m=0,
        nexus_a=0,
        rotary_base=_number(_rope(config), "rope_theta", ROPE_THETA),
        norm_epsilon=_number(config, "rms_norm_eps", EPSILON),
        init_method_std=_number(config, "initializer_range", STD),
    )
    if kind != NEXUSFORMER.model_type:
        return model
    values: dict[str, Any] = {ours: _whole(config, theirs, 0) for ours, theirs in NEXUS_SIZES.items()}
    values |= {name: config[name] for name in CHOICES}
    return ModelConfig(
        **{
            **vars(model),
            **values,
            "attention_order": _whole(config, "attention_order", 1),
            "attention_inner": _inner(config),
            "attention_gate": bool(config.get("attention_gate")),
            "qk_layernorm": bool(config.get("qk_norm")),
            "nexus_inner_norm": bool(config.get("nexus_inner_norm")),
            "nexus_inner_norm_scale": config.get("nexus_inner_norm_scale", "hidden"),
            "nexus_output_projection": bool(config.get("nexus_output_projection")),
        }
    )


def _problems(config: JsonObject) -> Iterator[str]:
    kind = config.get("model_type")
    if kind not in KINDS:
        yield f"model_type {kind!r} cannot be imported: give a model of the types {', '.join(KINDS)}"
        return
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if not isinstance(config.get(name), int) or _whole(config, name) < 1:
            yield f"{name} is {config.get(name)!r} in config.json: it must be a whole number above 0"
    for name, choices in CHOICES.items() if kind == NEXUSFORMER.model_type else ():
        if config.get(name) not in choices:
            yield f"{name} is {config.get(name)!r}, and known here are {', '.join(choices)}"
    inner, known = _inner(config), get_args(InnerAttention)
    if inner not in known:
        yield f"attention_inner is {inner!r}, and known here are {', '.join(known)}"
    scale = config.get("nexus_inner_norm_scale", "hidden")
    if scale not in get_args(InnerNormScale):
        yield f"nexus_inner_norm_scale is {scale!r}, and known here are {', '.join(get_args(InnerNormScale))}"
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
        yield f"sliding_window {config['sliding_window']!r}: every token sees all before it here"
    layers = config.get("layer_types")
    if isinstance(layers, list) and set(layers) - {"full_attention"}:
        others = ", ".join(sorted(map(str, set(layers) - {"full_attention"})))
        yield f"layer_types has {others}: every token sees all before it here"
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        yield f"rope scaling {scaling!r}: positions are never scaled here; choose a model without it"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor: all channels of a head turn here; choose another model"


def _inner(config: JsonObject) -> str:
    """The form of inner attentions, of which files of order 2 said nothing while there was one."""
    higher = _whole(config, "attention_order", 1) > 1
    return str(config.get("attention_inner", INNER_BEFORE_IT_WAS_RECORDED if higher else "self"))


def _rope(config: JsonObject) -> JsonObject:
    """The rotary settings: `rope_parameters`, or as transformers 4 wrote them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope: JsonObject = dict(found) if isinstance(found, dict) else {"rope_type": found}
    return {"rope_theta": config.get("rope_theta", ROPE_THETA), **rope}


def _number(config: JsonObject, name: str, default: float) -> float:
    return float(_typed(config, name, default, float))


def _whole(config: JsonObject, name: str, default: int | None = None) -> int:
    return int(_typed(config, name, default, int))


def _typed(config: JsonObject, name: str, default: float | None, kind: Callable[[float], float]) -> float:
    """A number of a configuration; null stands for the default. Raises ConfigError where it is none."""
    found = config.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or kind(found) != found:
        raise ConfigError([f"{name} is {found!r} in config.json: it must be a number"])
    return found


def context_length(config: JsonObject) -> int:
    """Tokens of the longest text that the model was made for."""
    return _whole(config, "max_position_embeddings", 2048)


def ties_head(config: JsonObject) -> bool:
    """Whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings", False))
