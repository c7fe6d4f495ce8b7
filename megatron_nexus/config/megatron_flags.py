"""Flags of Megatron-LM, GPT-NeoX and DeepSpeed scripts that mean nothing here, and what takes their place.

The table is `megatron_flags.toml`, grouped by remedy; it is read when a flag is unknown.
"""

import tomllib
from functools import cache
from importlib.resources import files

from megatron_nexus.base.invocation import with_commands


def replacement_hint(flag: str) -> str | None:
    """Return what to do in place of a foreign flag such as `--fp16`; None where it is not known either."""
    return with_commands(_remedies("training").get(_name(flag), "")) or None


def family_hint(flag: str) -> str | None:
    """Return the same by what a flag begins with, such as `--moe-`: for one unlike any flag of ours."""
    families = {name[:-1]: remedy for name, remedy in _remedies("training").items() if name.endswith("*")}
    # The longest beginning says most.
    found = max((name for name in families if _name(flag).startswith(name)), key=len, default="")
    return with_commands(families.get(found, "")) or None


def instead_of_preprocessing(flag: str) -> str | None:
    """Return the same for a flag of Megatron-LM's tools/preprocess_data.py."""
    return _remedies("preprocessing").get(_name(flag))


@cache
def _remedies(table: str) -> dict[str, str]:
    """Return what to do instead, by flag."""
    text = files("megatron_nexus.config").joinpath("megatron_flags.toml").read_text(encoding="utf-8")
    return {flag: remedy for remedy, flags in tomllib.loads(text)[table].items() for flag in flags.split()}


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("_", "-")
