"""The rules between the fields of the model."""

from collections.abc import Iterable
from math import isqrt

from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.run_config import RunConfig

BELONGING: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "nexus_inner_norm": ("projection", ("nexus",)),
    "nexus_output_projection": ("projection", ("nexus",)),
    "add_qkv_bias": ("projection", ("linear", "linear_nexus")),
    "pattention_slots": ("projection", ("pattention",)),
    "ffn_nexus_m": ("feed_forward", ("nexus",)),
    "base_ffn_hidden_size": ("feed_forward", ("pattention", "nexus")),
    "sliding_window": ("attention_order", (1,)),
}
"""Fields of some kinds of layers: the field that says the kind, and its values of those."""


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
    for name, (kind, values) in BELONGING.items():
        value, found = getattr(model, name), getattr(model, kind)
        if value > 0 and found not in values:
            owner = f"{flag_of(kind)} {' or '.join(map(str, values))}"
            given, remedy = (f" {value}", "give 0") if value is not True else ("", "drop the flag")
            yield f"{flag_of(name)}{given} belongs to {owner}, and this is {found}: {remedy}, or {owner}"
    if model.attention_order == 1:
        for flag, asked in {
            "--attention-inner cross": model.attention_inner == "cross",
            "--attention-gate": model.attention_gate,
        }.items():
            if asked:
                yield f"{flag} belongs to --attention-order 2 and above, and it is 1: raise it, or drop this"
    if model.qk_layernorm_all_heads and not model.qk_layernorm:
        yield "--qk-layernorm-all-heads says what --qk-layernorm is of: give both, or neither"
    if model.qk_layernorm_all_heads and model.base_kv_channels:
        yield (
            f"--base-kv-channels {model.base_kv_channels} says that heads have grown, and with "
            "--qk-layernorm-all-heads they do not: drop the flag"
        )
    if 0 < model.rope_high_freq_factor <= model.rope_low_freq_factor:
        yield (
            f"--rope-low-freq-factor {model.rope_low_freq_factor} must be below --rope-high-freq-factor "
            f"{model.rope_high_freq_factor}: Llama 3.1 has 1 and 4"
        )
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
