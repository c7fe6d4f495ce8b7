"""The command line of a run: flags over a preset, one flag for each field of `run_config`.

`parse` is pure: it reads no file and asks no machine, so it answers on a login node.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NoReturn, get_args, get_origin, get_type_hints

from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS, Value
from megatron_nexus.config.run_config import SECTIONS, RunConfig
from megatron_nexus.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one error that names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def make_parser() -> argparse.ArgumentParser:
    """The parser: a group for each section; a flag that is not given leaves no attribute behind."""
    parser = _Parser(
        prog="pretrain_nexus.py",
        description=f"Pretrain a Nexusformer. Without a flag: {DEFAULT_PRESET} on a built-in corpus.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"named sizes (default: {DEFAULT_PRESET})")
    # The deepspeed launcher appends --local_rank; the environment says the same and is what is read.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0])
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            flags = [_flag(entry.name), *entry.metadata["aliases"]]
            default = PRESETS[DEFAULT_PRESET].get(entry.name, entry.default)
            text = f"{entry.metadata['help']} (default: {default!r})".replace("%", "%%")
            hint = hints[entry.name]
            if hint is bool:
                group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
            elif get_origin(hint) is tuple:
                group.add_argument(*flags, nargs="+", help=text, metavar="WORD")
            elif get_origin(hint) is not None:
                group.add_argument(*flags, choices=get_args(hint), help=text)
            else:
                group.add_argument(*flags, type=hint, help=text, metavar=hint.__name__.upper())
        if section == "training":
            for precision in ("bf16", "fp32"):
                group.add_argument(
                    f"--{precision}",
                    dest="precision",
                    action="store_const",
                    const=precision,
                    help=f"short for --precision {precision}",
                )
    return parser


def given_flags(argv: Sequence[str]) -> dict[str, Value]:
    """The fields that the command line names, with their values, `preset` among them.

    Raises ConfigError on an unknown flag, a wrong type or a wrong choice.
    """
    parser = make_parser()
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        problems = []
        for before, word in pairwise(["", *unknown]):
            if not word.startswith("-"):
                if not before.startswith("-"):  # else it is that flag's value
                    problems.append(f"{word!r} belongs to no flag: drop it, or name its flag; see --help")
                continue
            near = difflib.get_close_matches(word.split("=")[0], flags, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "see --help for all flags"
            problems.append(f"unknown flag {word}: {remedy}")
        raise ConfigError(problems)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(known).items()}
    given.pop("local_rank", None)
    return given


def build(given: Mapping[str, Value], saved: RunConfig | None = None) -> RunConfig:
    """The configuration of `given` flags over a preset, or over that of the checkpoint a run starts from.

    A checkpoint hands on its model, which flags can only confirm, and its training, optimizer and data,
    which flags change. Where ranks lie, where checkpoints go and what is told are each run's own.

    Raises ConfigError where flags contradict the checkpoint's model.
    """
    if saved is None:
        name = str(given.get("preset", DEFAULT_PRESET))
        values: dict[str, object] = {**PRESETS[name], **given}
    else:
        name = saved.preset
        model = dataclasses.asdict(saved.model)
        clashes = [
            f"{_flag(field)} {given[field]!r} is not the checkpoint's {value!r}: drop the flag, or start "
            f"a new run without --load"
            for field, value in {"preset": name, **model}.items()
            if given.get(field, value) != value
        ]
        if clashes:
            raise ConfigError(clashes)
        kept = (saved.model, saved.training, saved.optimizer, saved.data)
        values = {name: value for section in kept for name, value in vars(section).items()} | dict(given)
    sections = {
        section: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
        for section, kind in SECTIONS.items()
    }
    return RunConfig(preset=name, **sections)


def from_saved(saved: Mapping[str, object]) -> RunConfig:
    """The configuration that a checkpoint holds as JSON. Raises KeyError or TypeError where it is none."""
    sections = {}
    for section, kind in SECTIONS.items():
        values = saved[section]
        if not isinstance(values, dict):
            raise TypeError(f"{section} is no section")
        # JSON has lists for our tuples.
        sections[section] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return RunConfig(preset=str(saved["preset"]), **sections)
