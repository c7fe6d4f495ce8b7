"""Which growths can divide the outgoing weights of units: `--init split` and `--init pairs`."""

from collections.abc import Iterator, Mapping

from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.spec.growth_rule import Init

UNITS = (
    "nexus_m",
    "nexus_a",
    "ffn_hidden_size",
    "ffn_nexus_m",
    "num_attention_heads",
    "num_query_groups",
    "pattention_slots",
)
"""Sizes that count units which can be copied or paired."""


def _before(old: ModelConfig, name: str) -> int:
    """Return a size of the model; 0 query groups are as many as heads."""
    return old.query_groups if name == "num_query_groups" else int(getattr(old, name))


def division_problems(
    old: ModelConfig, sizes: Mapping[str, int], init: Init, split_share: float
) -> Iterator[str]:
    """Yield why a model cannot grow so with this `init`: the function would change, or copies never part."""
    grown = [(name, _before(old, name), sizes[name]) for name in UNITS if name in sizes]
    grown = [(name, before, after) for name, before, after in grown if after > before]
    if init == "pairs":
        for name, before, after in grown:
            if (after - before) % 2:
                yield (
                    f"--init pairs adds units two by two, and {flag_of(name)} {after} adds {after - before}: "
                    f"give {after + 1}, or use --init out_rand"
                )
    if init != "split":
        return
    if 0.0 < split_share < 0.5 or split_share > 2.0:  # others are no positive numbers, which its bound says
        yield (
            f"--split-share {split_share} must lie in [0.5, 2]: there alone both parts add up exactly to the "
            "old weight in float32: give such as 1.5"
        )
    for name, before, after in grown:
        if after > 2 * before:
            yield (
                f"--init split at most doubles {flag_of(name)} {before}, and {after} is more: of three "
                f"copies of a unit two have the same sign, which Adam never parts: give up to {2 * before}, "
                "or use --init out_rand"
            )
        is_slots = name == "pattention_slots" or (name, old.feed_forward) == ("ffn_hidden_size", "pattention")
        if is_slots and after != 2 * before:
            yield (
                "--init split copies slots, whose norm all of them share: exact only where each is copied, "
                f"and {flag_of(name)} {after} is not twice {before}: give {2 * before}, or use "
                "--init out_rand"
            )
    yield from _hidden_problems(old, sizes.get("hidden_size", old.hidden_size))


def _hidden_problems(old: ModelConfig, hidden_size: int) -> Iterator[str]:
    """Yield why the residual stream cannot be there twice."""
    if hidden_size <= old.hidden_size:
        return
    flag = f"--hidden-size {hidden_size}"
    if hidden_size != 2 * old.hidden_size:
        yield (
            "--init split repeats the hidden units, whose norms all of them share: exact only where each is "
            f"copied, and {flag} is not twice {old.hidden_size}: give {2 * old.hidden_size}, or grow it with "
            "--init out_rand"
        )
    if old.nexus_inner_norm:
        yield f"--init split: {flag} changes the scale of the inner norm: grow it with --init out_rand"
    if old.normalization == "NonParametricLayerNorm" and old.norm_size != old.hidden_size:
        yield (
            f"--init split: {flag} of a model whose hidden size has grown before would change the mean in "
            "its LayerNorm: grow it with --init out_rand"
        )
