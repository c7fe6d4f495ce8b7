"""The command line of a run: flags over a configuration file over a preset, a flag for each field.

Nothing here asks the machine, so it answers on a login node.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from megatron_nexus.base.invocation import command
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.data_path import token_count
from megatron_nexus.config.devices import DEVICES
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.injection import KINDS
from megatron_nexus.config.megatron_flags import family_hint, replacement_hint
from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS, Value
from megatron_nexus.config.run_config import ALL_SECTIONS, SECTIONS, RunConfig, TrainingConfig
from megatron_nexus.errors import ConfigError, raise_problems

# Flags that launchers and scripts add and nobody here reads.
LAUNCHER_FLAGS = ("--local_rank", "--local-rank", "--deepspeed")
# What most command lines say: the help begins with these.
MAIN_FIELDS = (
    *("data_path", "tokenizer_model", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("global_batch_size", "train_iters", "lr", "save", "load"),
)


DESCRIPTIONS = {
    "train": f"Pretrain a Nexusformer. Without a flag: {DEFAULT_PRESET} on a built-in corpus.",
    "unlearn": "Train the model of --load to forget some answers and to retain others, with the flags of "
    "`train` but for those of its data.",
}
"""What the verbs do that train a model."""


def make_parser(verb: str = "train") -> FlagParser:
    """Return the parser: the main flags, then a group for each section, then what the command itself reads.

    A flag that is not given leaves no attribute behind.
    """
    parser = FlagParser(
        verb,
        "[flags]",
        description=DESCRIPTIONS[verb],
        argument_default=argparse.SUPPRESS,
    )
    main = parser.add_argument_group(
        "main flags", "What most command lines say; all others follow by section."
    )
    parser.replacement_hint, parser.family_hint = replacement_hint, family_hint
    main.add_argument(
        "--preset",
        type=preset_name,
        metavar="NAME",
        help=f"sizes and settings of a named model; `{command('presets')}` lists them "
        f"(default: {DEFAULT_PRESET})",
    )
    _add_command_flags(parser)
    hints = {name: hint for kind in ALL_SECTIONS.values() for name, hint in get_type_hints(kind).items()}
    fields = {entry.name: entry for kind in SECTIONS.values() for entry in dataclasses.fields(kind)}
    for name in MAIN_FIELDS:
        add_field_flag(main, fields[name], hints[name])
    for section, kind in (SECTIONS if verb == "train" else ALL_SECTIONS).items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0])
        for entry in dataclasses.fields(kind):
            if entry.name not in MAIN_FIELDS:
                add_field_flag(group, entry, hints[entry.name])
        if section == "training":
            for precision in ("bf16", "fp32"):
                group.add_argument(
                    f"--{precision}",
                    dest="precision",
                    action="store_const",
                    const=precision,
                    help=f"short for --precision {precision}",
                )
    # The help ends with the flags that are in no group of their own, where argparse begins.
    parser._action_groups.append(parser._action_groups.pop(parser._action_groups.index(parser._optionals)))
    return parser


def _add_command_flags(parser: FlagParser) -> None:
    """Add what the command itself reads, and what launchers add."""
    flag = parser.add_flag
    flag("--config", "YAML file of settings; flags win over it", metavar="FILE")
    flag("--dry-run", "print costs, memory per rank and the configuration, and stop", action="store_true")
    flag("--world-size", "ranks that --dry-run plans for (default: tp x pp)", type=int)
    flag(
        "--device",
        f"device that --dry-run plans for, which need not be there: {', '.join(DEVICES)}, with other "
        "numbers as in h100,memory=93, or memory=80,bf16=800,bandwidth=3.35 (default: this machine)",
        metavar="NAME",
    )
    text = "have --dry-run --device find the fastest layouts that fit on --world-size devices"
    flag("--search", text, action="store_true")
    text = f"rehearse a fault, once in a run's folder: {', '.join(KINDS)}; such as rank_hung@12,rank=1"
    flag("--inject", text, nargs="+", action="extend", metavar="FAULT@STEP[,rank=R]")
    # The deepspeed launcher appends --local_rank; the environment says the same and is what is read.
    # DeepSpeed's own scripts take --deepspeed.
    for ignored in LAUNCHER_FLAGS:
        parser.add_argument(ignored, nargs="?", help=argparse.SUPPRESS)


def add_field_flag(group: argparse._ArgumentGroup, entry: dataclasses.Field[object], hint: Any) -> None:
    """Add the flag of a field, whose values are of the type `hint`."""
    flags = [flag_of(entry.name), *entry.metadata["aliases"]]
    default = PRESETS[DEFAULT_PRESET].get(entry.name, entry.default)
    shown = "empty" if default in ("", ()) else repr(default)
    text = f"{entry.metadata['help']} (default: {shown})".replace("%", "%%")
    if hint is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(hint) is tuple:
        group.add_argument(*flags, nargs="+", help=text, metavar="WORD")
    elif get_origin(hint) is not None:
        group.add_argument(*flags, choices=get_args(hint), help=text)
    else:
        group.add_argument(*flags, type=hint, help=text)


def preset_name(text: str) -> str:
    """Return the name of a preset. Raises ConfigError, which names the nearest, where there is none."""
    if text not in PRESETS:
        containing = [name for name in PRESETS if text and text in name]
        near = [*containing, *difflib.get_close_matches(text, PRESETS, n=1, cutoff=0)][0]
        raise ConfigError(
            f"--preset {text!r} is not a preset, {near} is the nearest: give one that "
            f"`{command('presets')}` lists"
        )
    return text


def given_flags(argv: Sequence[str], verb: str = "train") -> dict[str, Value]:
    """Return the fields that the command line names, with their values, `preset` among them.

    Raises ConfigError on an unknown flag, a wrong type or a wrong choice.
    """
    known = make_parser(verb).parse_args(argv)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(known).items()}
    for flag in LAUNCHER_FLAGS:
        given.pop(flag.strip("-").replace("-", "_"), None)
    if len(lengths := [flag_of(name) for name in LENGTHS if name in given]) > 1:
        raise ConfigError(f"{' and '.join(lengths)} both say how long to train: give one of them")
    return given


def merge_settings(file: Mapping[str, Value], flags: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings of a configuration file with those of the command line over them."""
    replaced = set(LENGTHS) if flags.keys() & set(LENGTHS) else set()
    return {name: value for name, value in file.items() if name not in replaced} | dict(flags)


INTERVALS = ("save_interval", "log_interval", "eval_interval", "eval_iters")
"""How often a run saves, logs and validates, and on how much; presets say it, and it outlives a restart."""


LENGTHS: dict[str, Value] = {"train_iters": 0, "train_tokens": "", "train_samples": 0}
"""How long to train: one of them is said, the others are not."""

IN_STEPS = ("lr_warmup_iters", "lr_decay_iters", "lr_wsd_decay_iters", "lr_start_iter")
IN_SAMPLES = ("lr_warmup_samples", "lr_decay_samples", "lr_wsd_decay_samples")


@dataclass(frozen=True)
class Consumed:
    """How far the checkpoint that a run starts from has come."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def build(
    given: Mapping[str, Value], saved: RunConfig | None = None, consumed: Consumed = Consumed()
) -> RunConfig:
    """Return the configuration of `given` flags over a preset, or over that of the checkpoint that is loaded.

    A checkpoint hands on its model, which flags can only confirm, and its training, optimizer, data and
    intervals, which flags change. The mesh, where checkpoints go and what is logged belong to each run.
    A budget of tokens or samples becomes the steps that read what `consumed` leaves of it, at the present
    size of the batch and of a sample.

    Raises ConfigError where flags contradict the checkpoint's model, or a budget is not a number.
    """
    if saved is None:
        name = str(given.get("preset", DEFAULT_PRESET))
        values: dict[str, object] = dict(PRESETS.get(name, {}))
    else:
        name = saved.preset
        model = dataclasses.asdict(saved.model)
        clashes = [
            f"{flag_of(field)} {given[field]!r} is not the checkpoint's {value!r}: drop the flag, or start "
            f"a new run without --load"
            for field, value in {"preset": name, **model}.items()
            if given.get(field, value) != value
        ]
        raise_problems(clashes)
        kept = (saved.model, saved.training, saved.optimizer, saved.data)
        values = {name: value for section in kept for name, value in vars(section).items()}
        often = vars(saved.checkpoint) | vars(saved.logging)
        values |= {name: often[name] for name in INTERVALS}
    if given.keys() & LENGTHS.keys():
        values |= {name: unsaid for name, unsaid in LENGTHS.items() if name != "train_iters"}
    if given.keys() & set(IN_SAMPLES):
        values |= dict.fromkeys(IN_STEPS, 0)
    elif given.keys() & set(IN_STEPS):
        values |= dict.fromkeys(IN_SAMPLES, 0)
    values |= dict(given)
    sections = {
        section: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
        for section, kind in ALL_SECTIONS.items()
    }
    config = RunConfig(preset=name, **sections)
    training = config.training
    budget = training.train_tokens or training.train_samples > 0
    if budget and training.global_batch_size > 0:  # else the rules refuse the batch
        steps = consumed.step + config.batches.steps(consumed.samples, _samples_left(training, consumed))
        config = dataclasses.replace(config, training=dataclasses.replace(training, train_iters=steps))
    return config


def model_name(config: RunConfig) -> str:
    """Return the preset's name, with a word where sizes were changed by hand."""
    if config.preset not in PRESETS or config.model == build({"preset": config.preset}).model:
        return config.preset
    return f"{config.preset}, resized"


def _samples_left(training: TrainingConfig, consumed: Consumed) -> int:
    """Return the samples that are left of a budget. Raises ConfigError where it is not a number."""
    if training.train_samples > 0:
        return training.train_samples - consumed.samples
    wanted = token_count(training.train_tokens)
    if wanted is None or wanted < 1:
        raise ConfigError(
            f"--train-tokens {training.train_tokens} is not a number of tokens: write such as 100B, "
            "1.5M or 4096"
        )
    return -(-(wanted - consumed.tokens) // max(1, training.seq_length))
