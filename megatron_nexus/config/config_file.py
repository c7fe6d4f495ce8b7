"""Configuration files: YAML with one mapping for each section of `run_config`, and the preset's name.

    preset: nexusformer-240m
    parallel: {tensor_model_parallel_size: 2}
    training: {train_tokens: 100B}

A file says only what differs from its preset; flags win over it. The file that a run writes says all.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import cast, get_args, get_origin, get_type_hints

import yaml

from megatron_nexus.base.json_text import fits
from megatron_nexus.config.model_config import INNER_BEFORE_IT_WAS_RECORDED
from megatron_nexus.config.presets import PRESETS, Value
from megatron_nexus.config.run_config import ALL_SECTIONS, SECTIONS, RunConfig
from megatron_nexus.errors import ConfigError, flag_errors, raise_problems

CONFIG_FILE = "config.yaml"
"""In the folder of a run: what it was configured as."""

# What the file that a run wrote says of its model, whatever version wrote it.
ALWAYS_WRITTEN = {
    *("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size"),
    *("projection", "nexus_m", "nexus_a", "rotary_base", "norm_epsilon", "init_method_std"),
}
# Where one run's files lie, and what only its start did to the checkpoint that it loaded.
NEVER_WRITTEN = {"checkpoint": ("save", "load", "grow", "reset_optimizer")}


def read_config_file(path: Path) -> dict[str, Value]:
    """Return the fields that a file sets, by name, `preset` among them.

    Raises ConfigError with every problem: no YAML, an unknown key, a value of the wrong type.
    """
    try:
        with flag_errors("--config", path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 text: give a YAML file") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = f":{error.problem_mark.line + 1}" if isinstance(error, yaml.MarkedYAMLError) else ""
        what = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise ConfigError(f"--config {path}{where}: {what}: correct the YAML") from error
    except ValueError as error:  # such as a date that does not exist, a number of 5,000 digits
        raise ConfigError(f"--config {path}: {error}: correct the value") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path} is nested too deeply: write sections with settings") from error
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path} holds no sections: write preset: ..., model: ..., training: ...")
    values: dict[str, Value] = {}
    problems = [f"--config {path}: {problem}" for problem in (*_twice(node), *_read(document, values))]
    if _says_all_sizes(document) and values.get("attention_order", 1) != 1:
        values.setdefault("attention_inner", INNER_BEFORE_IT_WAS_RECORDED)
    if len(said := [name for name in ("train_tokens", "train_samples", "train_iters") if name in values]) > 1:
        problems.append(f"--config {path}: {' and '.join(said)} both say how long to train: keep one")
    raise_problems(problems)
    return values


def config_text(config: RunConfig) -> str:
    """Return the YAML of a resolved configuration, every field included but those of NEVER_WRITTEN.

    A budget is written as it was given, without the steps that follow from it.
    """
    training = config.training
    sections: dict[str, object] = {"preset": config.preset}
    budget = bool(training.train_tokens or training.train_samples)
    unsaid = {"train_tokens": not training.train_tokens, "train_samples": not training.train_samples}
    lengths = [name for name, left_out in {**unsaid, "train_iters": budget}.items() if left_out]
    for section in ALL_SECTIONS if config.unlearning.is_on else SECTIONS:
        left_out = (*NEVER_WRITTEN.get(section, ()), *lengths)
        fields = dataclasses.asdict(getattr(config, section))
        sections[section] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in left_out
        }
    text: str = yaml.safe_dump(sections, sort_keys=False, width=100)
    return text


def _twice(node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> Iterable[str]:
    """Yield the keys that a mapping has twice, of which YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode) and node not in above:
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"line {key.start_mark.line + 1} sets {key.value} again: keep one of the two"
            seen.add(key.value)
            yield from _twice(value, (*above, node))


def _read(document: dict[object, object], values: dict[str, Value]) -> Iterable[str]:
    """Put the document's fields into `values`; yield what is wrong with them."""
    for key, content in document.items():
        if key == "preset":
            # A file that says every size may have a name of its own for them, as a grown run's has.
            if isinstance(content, str) and (content in PRESETS or _says_all_sizes(document)):
                values["preset"] = content
            else:
                yield _unknown(f"preset {content!r}", str(content), list(PRESETS))
        elif key not in ALL_SECTIONS:
            homes = {name: section for section, kind in ALL_SECTIONS.items() for name in get_type_hints(kind)}
            if key in homes:
                yield f"{key} stands outside its section: write it under {homes[str(key)]}:"
            else:
                yield _unknown(f"section {key!r}", str(key), ["preset", *SECTIONS])
        elif content is None:
            continue  # a section whose lines are all commented out
        elif not isinstance(content, dict):
            yield f"{key} {content!r} is not a mapping: write {key}: and its fields below it"
        else:
            hints = get_type_hints(ALL_SECTIONS[str(key)])
            for name, value in content.items():
                if name not in hints:
                    yield _unknown(f"{key}.{name}", str(name), list(hints))
                    continue
                try:
                    values[name] = _typed(value, hints[name])
                except ValueError as error:
                    yield f"{key}.{name} {value!r} {error}"


def _says_all_sizes(document: dict[object, object]) -> bool:
    """Return whether a run wrote a file, with this version or an earlier one with fewer fields."""
    sizes = document.get("model")
    return isinstance(sizes, dict) and sizes.keys() >= ALWAYS_WRITTEN


def _typed(value: object, hint: type) -> Value:
    """Return `value` as a field of type `hint`. Raises ValueError that says what is wanted."""
    if get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(str(word) for word in value)
        if isinstance(value, str):
            return tuple(value.split())
        raise ValueError("must be a list of words: write [0.7, a, 0.3, b]")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML reads 1e-3, without a point, as a text
    elif fits(value, hint):
        return cast(Value, value)
    if get_origin(hint) is not None:
        raise ValueError(f"must be one of {', '.join(get_args(hint))}")
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: 'a text in quotes: "..."'}
    raise ValueError(f"must be {wanted[hint]}")


def _unknown(what: str, word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"unknown {what}: " + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(choices)}")
