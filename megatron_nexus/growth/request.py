"""Growth as a user asks for it: the sizes of the larger model, and how its new weights begin."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from megatron_nexus.base.invocation import command
from megatron_nexus.config.command_line import add_field_flag
from megatron_nexus.config.config_field import bound_problems, flag_of, growing_fields
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.growth.division import division_problems
from megatron_nexus.growth.settings import EARLIER, GrowthConfig
from megatron_nexus.spec.growth_rule import DIVIDING, Init

GROWING = growing_fields(ModelConfig)
"""The fields of a model that growth can raise; all others stay."""


def model_before(model: ModelConfig, axes: Mapping[str, Sequence[int]]) -> ModelConfig:
    """Return a model of the tensors that `model` had before it grew along `axes`."""
    sizes: dict[str, Any] = {name: old for name, (old, _) in axes.items()}
    gate = model.attention_gate and "attention_order" not in axes
    return replace(model, **sizes, attention_gate=gate)


def _foreign_sizes(old: ModelConfig, sizes: Mapping[str, int]) -> list[str]:
    """List the sizes asked to grow that a model of this kind does not have."""
    foreign: dict[str, str] = {}
    if not old.has_nexus:
        remedy = f"give it some with {command('upcycle')}" if old.projection == "linear" else "drop the flag"
        reason = f"for --projection nexus, and this model has --projection {old.projection}: {remedy}"
        foreign |= {"nexus_m": reason, "nexus_a": reason}
    if old.projection != "pattention":
        kind = f"for --projection pattention, and this model has --projection {old.projection}"
        foreign["pattention_slots"] = f"{kind}: drop the flag"
    if old.feed_forward != "nexus":
        kind = f"for --feed-forward nexus, and this model has --feed-forward {old.feed_forward}"
        foreign["ffn_nexus_m"] = f"{kind}: drop the flag"
    return [
        f"{flag_of(name)} {sizes[name]} is {reason}"
        for name, reason in foreign.items()
        if sizes.get(name, getattr(old, name)) != getattr(old, name)
    ]


def _nexus_widths(model: ModelConfig) -> list[str]:
    names = ["nexus_m", "nexus_a"] if model.has_nexus else []
    return [*names, "ffn_nexus_m", "ffn_hidden_size"] if model.feed_forward == "nexus" else names


def _active_at_once(old: ModelConfig, sizes: Mapping[str, int], init: Init) -> Iterator[str]:
    """Yield why `init` would change the function: norms over units that become active at once."""

    def grows(*names: str) -> bool:
        return any(sizes.get(name, 0) > getattr(old, name) for name in names)

    if old.nexus_inner_norm and grows(*_nexus_widths(old)):
        yield (
            f"--init {init} makes new units of M and A active at once, which this model's inner norm "
            "sees, so the function would change: use --init out_rand"
        )
    slots = [
        flag_of(name)
        for name, kind in (("pattention_slots", old.projection), ("ffn_hidden_size", old.feed_forward))
        if kind == "pattention" and grows(name)
    ]
    if slots and init != "split":
        yield (
            f"--init {init} gives new slots ({', '.join(slots)}) random keys, which the norm over all slots "
            "sees at once, so the function would change: use --init out_rand, which begins with keys of zero"
        )


def _setting_problems(old: ModelConfig, sizes: Mapping[str, int], growth: GrowthConfig) -> Iterator[str]:
    """Yield what is asked of attention, of new layers or of moments where nothing is new."""
    order = sizes.get("attention_order", old.attention_order)
    if order == old.attention_order and growth.attention_inner != GrowthConfig.attention_inner:
        yield (
            f"--attention-inner {growth.attention_inner} belongs to an --attention-order above the "
            f"checkpoint's {old.attention_order}: give one, or drop the flag"
        )
    if order != old.attention_order and old.attention_order > 1:
        yield (
            f"--attention-order {order}: the checkpoint's attention is of order {old.attention_order} "
            "already, and only order 1 can be raised without changing the function: drop the flag"
        )
    deeper = sizes.get("num_layers", 0) > old.num_layers
    if growth.depth_init != GrowthConfig.depth_init and not deeper:
        yield (
            f"--depth-init {growth.depth_init} is about new layers, and none are requested besides the "
            f"checkpoint's {old.num_layers}: give a larger --num-layers, or drop the flag"
        )
    if growth.moments != GrowthConfig.moments and not sizes:
        yield (
            f"--moments {growth.moments} belongs to a growth, and no size is given: give one, or "
            "drop the flag"
        )
    if old.no_rope_freq and deeper and growth.placement != "end":
        yield (
            f"new layers among the old ones would move those without rotary embedding (--no-rope-freq "
            f"{old.no_rope_freq}), and the function would change: use --depth-placement end"
        )
    # Settings that another --init reads.
    readers: tuple[tuple[str, Init], ...] = (("split_share", "split"), ("noise_share", "noise"))
    for name, reader in readers:
        value = getattr(growth, name)
        if growth.init != reader and value != getattr(GrowthConfig, name) and not any(bound_problems(growth)):
            yield (
                f"{flag_of(name)} {value} belongs to --init {reader}, and --init {growth.init} does not read "
                f"it: give --init {reader}, or drop {flag_of(name)}"
            )


def _fixed_sizes(old: ModelConfig, sizes: Mapping[str, int], growth: GrowthConfig) -> list[str]:
    """List the sizes that cannot grow in this model without changing its function or first steps."""
    reasons: dict[str, str] = {}
    if old.qk_layernorm_all_heads:
        why = (
            "the norm over the channels of all heads (--qk-layernorm-all-heads) would see new ones; grow "
            "other sizes of this model"
        )
        reasons |= dict.fromkeys(("num_attention_heads", "num_query_groups", "kv_channels"), why)
    if old.post_norm and growth.depth_init != "stack":
        reasons["num_layers"] = (
            "norms of what new layers give (--post-norm) would begin with zeros and blow up their "
            "gradients; use --depth-init stack"
        )
    return [
        f"{flag_of(name)} {sizes[name]}: {why}"
        for name, why in reasons.items()
        if sizes.get(name, 0) > getattr(old, name)
    ]


def _growth_problems(old: ModelConfig, sizes: Mapping[str, int], growth: GrowthConfig) -> Iterator[str]:
    for name, size in sizes.items():
        # 0 query groups are as many as heads.
        before = old.query_groups if name == "num_query_groups" and size else getattr(old, name)
        if size < before:
            yield f"{flag_of(name)} {size} is below the checkpoint's {before}, growth never shrinks: raise it"
    yield from _foreign_sizes(old, sizes)
    if growth.fill_rule in ("in_rand", *DIVIDING):
        yield from _active_at_once(old, sizes, growth.fill_rule)
    yield from division_problems(old, sizes, growth.fill_rule, growth.split_share)
    yield from _setting_problems(old, sizes, growth)
    yield from _fixed_sizes(old, sizes, growth)
    yield from bound_problems(growth)


def _grown_model(old: ModelConfig, sizes: Mapping[str, int], growth: GrowthConfig) -> ModelConfig:
    """Return the model that `old` becomes with the given sizes of the fields in GROWING.

    Raises ConfigError with every reason why it cannot.
    """
    assert set(sizes) <= set(GROWING), f"{sorted(set(sizes) - set(GROWING))} cannot grow"
    raise_problems(_growth_problems(old, sizes, growth))
    new = ModelConfig(**{**asdict(old), **sizes})
    if new.num_attention_heads * old.query_groups != old.num_attention_heads * new.query_groups:
        share = old.num_attention_heads // old.query_groups
        raise ConfigError(
            f"{new.num_attention_heads} heads in {new.query_groups} query groups: in the checkpoint each "
            f"group of keys and values serves {share} of {old.num_attention_heads} heads, and old heads "
            f"keep theirs: give --num-attention-heads as {share} times --num-query-groups"
        )
    changed: dict[str, Any] = {}
    times = 2 if growth.init == "split" else 1
    if new.hidden_size > old.hidden_size:
        # A stream that is there twice has twice the sum of squares.
        changed["base_hidden_size"] = times * old.norm_size
    if new.kv_channels > old.kv_channels:
        changed["base_kv_channels"] = old.rotary_channels
    if new.attention_order > old.attention_order:
        # Gates of zero: the function of order 1.
        changed |= {"attention_inner": growth.attention_inner, "attention_gate": True}
    # The scale of a Pattention stays that of its base size, or is the root of its slots as it is.
    times = 0 if growth.init == "random" else times
    if new.pattention_slots > old.pattention_slots:
        changed["base_pattention_slots"] = times * old.attention_scale_slots
    if new.feed_forward == "pattention" and new.ffn_hidden_size > old.ffn_hidden_size:
        changed["base_ffn_hidden_size"] = times * old.feed_forward_scale_slots
    if new.nexus_inner_norm and new.nexus_inner_norm_scale == "width":
        # Scales stay those of the widths that the old model was created with.
        grown = [name for name in _nexus_widths(old) if getattr(new, name) > getattr(old, name)]
        changed |= {f"base_{name}": getattr(old, f"base_{name}") or getattr(old, name) for name in grown}
    return replace(new, **changed)


def with_empty_branch(saved: RunConfig) -> RunConfig:
    """Return the configuration of a model of linear projections as one with Nexus-Ranks of no width.

    The same tensors and the same function; their M and A can grow from 0.

    Raises ConfigError: the projections are of another kind.
    """
    if saved.model.projection != "linear":
        raise ConfigError(
            f"the checkpoint's projections are {saved.model.projection}, and only linear ones can be "
            "given additional Nexus-Ranks: enlarge those it has with "
            f"{command('grow')}"
        )
    model = replace(saved.model, projection="linear_nexus", nexus_m=0, nexus_a=0)
    return replace(saved, model=model)


@dataclass(frozen=True)
class GrowthRequest:
    """Sizes to grow to, by field, and how the new weights begin. No sizes: the model stays."""

    sizes: Mapping[str, int]
    settings: GrowthConfig

    @classmethod
    def from_flags(cls, given: Mapping[str, int | float | str]) -> "GrowthRequest":
        """Make a request of parsed flags of `add_growth_flags`; other flags are ignored."""
        names = [entry.name for entry in fields(GrowthConfig)]
        settings: dict[str, Any] = {name: given[name] for name in names if name in given}
        sizes = {name: int(given[name]) for name in GROWING if name in given}
        return cls(sizes, GrowthConfig(**settings))

    def resolved(self, old: ModelConfig) -> "GrowthRequest":
        """Return the request with the `init` that "auto" means for the model `old`."""
        if self.settings.init != "auto":
            return self
        init: Init = "out_rand" if any(_active_at_once(old, self.sizes, "in_rand")) else "in_rand"
        return replace(self, settings=replace(self.settings, init=init))

    def made(self, old: ModelConfig, recorded: Mapping[str, Any]) -> bool:
        """Return whether a growth of the model `old`, with the settings recorded of it, is the one asked for.

        What is not said may have been the default of an earlier version.
        """
        default = GrowthConfig()
        return all(
            recorded.get(name) == value
            or (
                getattr(self.settings, name) == getattr(default, name)
                and recorded.get(name) == EARLIER.get(name, value)
            )
            for name, value in vars(self.resolved(old).settings).items()
        )


def grown_config(saved: RunConfig, request: GrowthRequest) -> RunConfig:
    """Return the configuration of a checkpoint after the growth.

    Raises ConfigError with every reason why it cannot.
    """
    settings = request.resolved(saved.model).settings
    old, new = saved.model, _grown_model(saved.model, request.sizes, settings)
    if new == old and request.sizes:
        asked = ", ".join(f"{name} {size}" for name, size in request.sizes.items())
        raise ConfigError(
            f"{asked}: the checkpoint has these sizes already: raise one, or give none to reshard"
        )
    return replace(saved, preset=_name(saved.preset, old, new), model=new)


def _name(old_name: str, old: ModelConfig, new: ModelConfig) -> str:
    """Name the larger model: the preset of its sizes, else the old name marked as grown."""
    if new == old:
        return old_name
    for name, values in PRESETS.items():
        unsaid = {name: getattr(ModelConfig, name) for name in GROWING}
        sizes = unsaid | {f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}
        if sizes.items() <= vars(new).items():
            return name
    return old_name if old_name.endswith("-grown") else f"{old_name}-grown"


def read_request(text: str, flag: str = "--grow") -> GrowthRequest:
    """Parse the value of `flag`, such as "nexus_m=1088 nexus_a=1228 init=in_rand": flags without dashes.

    Raises ConfigError: it asks for nothing, or for what does not exist.
    """
    parser = FlagParser(argument_default=argparse.SUPPRESS)
    add_growth_flags(parser)
    words = [word.lstrip("-").partition("=") for word in text.split()]
    if strays := [name for name, separator, _ in words if not separator or not name]:
        raise ConfigError(
            [f"{flag} {text!r}: {name!r} is not NAME=VALUE: write such as nexus_m=1088" for name in strays]
        )
    names = [name for name, _, _ in words]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError([f"{flag} {text!r} says {name} twice: keep one" for name in twice])
    given = parser.parse_args([f"{flag_of(name)}={value}" for name, _, value in words])
    request = GrowthRequest.from_flags(vars(given))
    if not request.sizes:
        raise ConfigError(
            f"{flag} {text!r} names no size: write such as nexus_m=1088, of {', '.join(GROWING)}"
        )
    return request


def add_growth_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each size that can grow and for each field of GrowthConfig."""
    sizes = parser.add_argument_group("sizes", "Larger sizes of the model; what is not given stays.")
    for entry in fields(ModelConfig):
        if entry.name in GROWING:
            flags = [flag_of(entry.name), *entry.metadata["aliases"]]
            sizes.add_argument(*flags, type=int, help=entry.metadata["help"])
    add_settings_flags(parser)


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of GrowthConfig."""
    settings = parser.add_argument_group("new weights", "How they begin.")
    hints = get_type_hints(GrowthConfig)
    for entry in fields(GrowthConfig):
        add_field_flag(settings, entry, hints[entry.name])
