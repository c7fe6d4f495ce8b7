"""The rules between the fields of the model."""

from collections.abc import Iterable
from math import isqrt

from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig


def divisors(number: int) -> str:
    """Return the divisors of `number`, as a remedy to read."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)})))


def model_problems(config: RunConfig) -> Iterable[str]:
    """Yield the problems of the model's sizes and kinds of layers."""
    model = config.model
    needed = {
        "nexus_m": (model.has_nexus, f"--projection {model.projection}"),
        "nexus_a": (model.has_nexus, f"--projection {model.projection}"),
        "pattention_slots": (model.projection == "pattention", "--projection pattention"),
        "ffn_nexus_m": (model.feed_forward == "nexus", "--feed-forward nexus"),
    }
    for name, (is_needed, kind) in needed.items():
        if is_needed and getattr(model, name) == 0:
            yield f"{flag_of(name)} 0 must be positive with {kind}: give a number above 0"
    if model.projection != "nexus":
        for flag, given in {
            "--nexus-inner-norm": model.nexus_inner_norm,
            "--nexus-output-projection": model.nexus_output_projection,
        }.items():
            if given:
                yield f"{flag} belongs to --projection nexus, and this is {model.projection}: drop the flag"
    if model.attention_order == 1:
        for flag, asked in {
            "--attention-inner cross": model.attention_inner == "cross",
            "--attention-gate": model.attention_gate,
        }.items():
            if asked:
                yield f"{flag} belongs to --attention-order 2 and above, and it is 1: raise it, or drop this"
    if model.add_qkv_bias and model.projection not in ("linear", "linear_nexus"):
        yield (
            f"--add-qkv-bias belongs to linear Q, K and V, and --projection is {model.projection}: drop the "
            "flag, or use --projection linear"
        )
    if model.qk_layernorm_all_heads and not model.qk_layernorm:
        yield "--qk-layernorm-all-heads says what --qk-layernorm is of: give both, or neither"
    if model.qk_layernorm_all_heads and model.base_kv_channels:
        yield (
            f"--base-kv-channels {model.base_kv_channels} says that heads have grown, and with "
            "--qk-layernorm-all-heads they do not: drop the flag"
        )
    if model.sliding_window > 0 and model.attention_order > 1:
        yield (
            f"--sliding-window {model.sliding_window} belongs to --attention-order 1, and this is "
            f"{model.attention_order}: drop one of them"
        )
    if 0 < model.rope_high_freq_factor <= model.rope_low_freq_factor:
        yield (
            f"--rope-low-freq-factor {model.rope_low_freq_factor} must be below --rope-high-freq-factor "
            f"{model.rope_high_freq_factor}: Llama 3.1 has 1 and 4"
        )
    yield from _pattention_problems(config)
    yield from _size_problems(model)


def _size_problems(model: ModelConfig) -> Iterable[str]:
    if model.num_query_groups > 0 and model.num_attention_heads % model.num_query_groups:
        yield (
            f"--num-query-groups {model.num_query_groups} does not divide --num-attention-heads "
            f"{model.num_attention_heads}: use {divisors(model.num_attention_heads)}"
        )
    if model.rotary_channels > 0 and model.rotary_channels % 2:
        flag = "--base-kv-channels" if model.base_kv_channels else "--kv-channels"
        yield (
            f"{flag} {model.rotary_channels} must be even, rotary embedding turns pairs of channels: "
            f"use {model.rotary_channels + 1}"
        )
    for name, base in vars(model).items():
        if name.startswith("base_") and base > max(size := getattr(model, name.removeprefix("base_")), 0):
            flag, of = flag_of(name), flag_of(name.removeprefix("base_"))
            yield f"{flag} {base} is above {of} {size}, models only grow: use at most {size}"


def _pattention_problems(config: RunConfig) -> Iterable[str]:
    model = config.model
    if model.projection != "pattention" and model.pattention_slots > 0:
        yield (
            f"--pattention-slots {model.pattention_slots} belongs to --projection pattention, and this is "
            f"{model.projection}: give 0, or another --projection"
        )
    if model.feed_forward == "swiglu" and model.base_ffn_hidden_size > 0:
        yield (
            f"--base-ffn-hidden-size {model.base_ffn_hidden_size} belongs to --feed-forward pattention or "
            "nexus, and this is swiglu, which has no scale to keep: drop the flag"
        )
    if model.feed_forward != "nexus" and model.ffn_nexus_m > 0:
        yield (
            f"--ffn-nexus-m {model.ffn_nexus_m} belongs to --feed-forward nexus, and this is "
            f"{model.feed_forward}: give 0, or --feed-forward nexus"
        )
    if not model.nexus_inner_norm and model.nexus_inner_norm_scale != "hidden":
        yield (
            f"--nexus-inner-norm-scale {model.nexus_inner_norm_scale} belongs to --nexus-inner-norm: "
            "add it, or drop the flag"
        )
    if model.normalization != "RMSNorm" and config.training.norm_impl != "torch":
        yield (
            f"--norm-impl {config.training.norm_impl} has RMSNorm, and --normalization is "
            f"{model.normalization}: use --norm-impl torch"
        )
