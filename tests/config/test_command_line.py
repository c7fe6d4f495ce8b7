"""Flags become the fields they name; whatever is wrong is answered with what to change."""

import dataclasses
import json
from functools import cache
from typing import get_args, get_origin, get_type_hints

import pytest

from megatron_nexus.config import command_line
from megatron_nexus.config.command_line import (
    IN_SAMPLES,
    Consumed,
    build,
    given_flags,
    make_parser,
)
from megatron_nexus.config.files_config import CheckpointConfig
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS
from megatron_nexus.config.run_config import SECTIONS, ParallelConfig, RunConfig
from megatron_nexus.errors import ConfigError

FIELDS = [
    (section, field.name, get_type_hints(kind)[field.name], field.default)
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
]
# A budget sets --train-iters too, and a schedule in samples is none in steps.
ALONE = [field for field in FIELDS if field[1] not in {"train_tokens", "train_samples", *IN_SAMPLES}]


def parse(*words: str) -> RunConfig:
    return build(given_flags(words))


def complaint(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    return str(caught.value)


def other_value(hint: type, default: object) -> object:
    """A value of a field's type that is not its default."""
    if get_origin(hint) is tuple:
        return ("somewhere/else",)
    if get_origin(hint) is not None:
        return next(choice for choice in get_args(hint) if choice != default)
    if hint is str:
        return "somewhere/else"
    assert isinstance(default, int | float)
    return hint(default + 3)


def test_field_names_are_unique_so_that_a_flag_names_one_of_them() -> None:
    names = [name for _, name, _, _ in FIELDS]
    assert len(names) == len(set(names)) > 40


def test_no_flags_give_the_default_preset() -> None:
    config = parse()
    assert config.preset == DEFAULT_PRESET
    values = {name: value for section in SECTIONS for name, value in vars(getattr(config, section)).items()}
    expected = {name: default for _, name, _, default in FIELDS} | PRESETS[DEFAULT_PRESET]
    assert values == expected


def test_every_flag_sets_its_field_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "make_parser", cache(make_parser))  # one for all: they are many
    before = parse()
    for section, name, hint, _ in ALONE:
        flag = "--" + name.replace("_", "-")
        if hint is bool:
            value: object = not getattr(getattr(before, section), name)
            words, opposite = (flag, f"--no-{flag[2:]}")[:: 1 if value else -1]
            assert getattr(getattr(parse(opposite), section), name) is not value, flag
            words = [words]
        else:
            value = other_value(hint, getattr(getattr(before, section), name))
            words = [flag, *(value if isinstance(value, tuple) else [str(value)])]
        changed = dataclasses.replace(getattr(before, section), **{name: value})
        found = parse(*words)
        assert found == dataclasses.replace(before, **{section: changed}), flag
        assert found != before, flag
        if hint is not bool:
            assert parse("=".join(words)) == found, flag


@pytest.mark.parametrize(
    ("alias", "full"),
    [
        ("--tp 2", "--tensor-model-parallel-size 2"),
        ("--pp 3", "--pipeline-model-parallel-size 3"),
        ("--head-dim 48", "--kv-channels 48"),
        ("--bf16", "--precision bf16"),
        ("--preset nexusformer-20m --fp32", "--preset nexusformer-20m --precision fp32"),
    ],
)
def test_an_alias_is_its_full_flag(alias: str, full: str) -> None:
    assert parse(*alias.split()) == parse(*full.split()) != parse("--preset", DEFAULT_PRESET)


def test_help_names_every_flag_with_its_default() -> None:
    text = " ".join(make_parser().format_help().split())
    for _, name, hint, default in FIELDS:
        assert f"--{name.replace('_', '-')}" in text
        shown = PRESETS[DEFAULT_PRESET].get(name, default)
        assert f"(default: {'empty' if shown in ('', ()) else repr(shown)})" in text, (name, hint)


def test_the_launcher_s_local_rank_is_accepted_and_is_no_field() -> None:
    assert "local_rank" not in given_flags(["--local_rank=3"])
    assert parse("--local_rank=3") == parse("--local-rank", "3") == parse()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning-rate 1", ["unknown flag --learning-rate"]),
        ("--tensor-parallel-size 2", ["--tensor-parallel-size: did you mean --tensor-model-parallel-size?"]),
        ("--train-iter=5", ["unknown flag --train-iter=5: did you mean --train-iters?"]),
        ("--bogus-flag", ["unknown flag --bogus-flag: drop it; see nexus"]),
        ("--model x", ["unknown flag --model: use --preset with", "or --load with"]),
        ("--model_name_or_path x", ["unknown flag --model_name_or_path: use --preset with"]),
        ("--train_itters 5", ["unknown flag --train_itters: did you mean --train-iters?"]),
        ("--finetune", ["--finetune: use --reset-optimizer"]),
        ("--moe-router-topk 2", ["--moe-router-topk: drop it: mixtures of experts are not offered"]),
        ("--override-opt_param-scheduler", ["drop it: flags win over the checkpoint's schedule"]),
        ("--zzzzzz", ["unknown flag --zzzzzz: drop it; see nexus"]),
        ("tp 2", ["'tp' belongs to no flag", "'2' belongs to no flag"]),
        ("--lr high", ["--lr", "'high'", "float"]),
        ("--num-layers 2.5", ["--num-layers", "'2.5'", "int"]),
        ("--num-layers", ["--num-layers", "expected one argument"]),
        ("--precision fp16", ["--precision", "'fp16'", "bf16", "fp32"]),
        ("--preset nexusformer-1t", ["--preset", "'nexusformer-1t'", "nexusformer-tiny", "nexus presets"]),
        ("--nexus-inner-norm=yes", ["--nexus-inner-norm", "'yes'"]),
    ],
)
def test_what_cannot_be_read_is_named_with_the_nearest_remedy(words: str, message: list[str]) -> None:
    text = complaint(*words.split())
    assert all(part in text for part in message), text


def test_a_flag_is_never_guessed_from_its_beginning() -> None:
    assert "unknown flag --num-lay: did you mean --num-layers?" in complaint("--num-lay", "2")


def test_all_unknown_flags_are_reported_at_once_and_their_values_are_not() -> None:
    text = complaint("--hiden-size", "64", "--num-layer", "2", "--tp", "2")
    assert text.startswith("2 problems")
    assert "--hidden-size?" in text and "--num-layers?" in text and "belongs to no flag" not in text


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default() -> None:
    assert PRESETS["nexusformer-20m"]["nexus_m"] != ModelConfig().nexus_m
    config = parse("--nexus-a", "500", "--preset", "nexusformer-20m")
    assert config.preset == "nexusformer-20m"
    assert config.model.nexus_a == 500
    assert config.model.nexus_m == PRESETS["nexusformer-20m"]["nexus_m"]
    assert config.optimizer.adam_eps == 1e-8


SAVED = build(
    given_flags(["--preset", "nexusformer-20m", "--vocab-size", "97", "--nexus-inner-norm", "--lr", "0.25"])
    | given_flags(["--data-path", "0.7", "a", "0.3", "b"])
)


def test_a_run_goes_on_as_its_checkpoint_was_configured_where_no_flag_says_otherwise() -> None:
    config = build(given_flags(["--weight-decay", "0.5", "--tp", "2", "--seq-length", "64"]), SAVED)
    assert (config.preset, config.model, config.data) == (SAVED.preset, SAVED.model, SAVED.data)
    assert config.optimizer == dataclasses.replace(SAVED.optimizer, weight_decay=0.5)
    assert config.training == dataclasses.replace(SAVED.training, seq_length=64)
    assert config.optimizer.lr == 0.25


def test_where_ranks_lie_and_what_is_kept_is_each_run_s_own() -> None:
    saved = build(
        {**given_flags(["--tp", "2", "--save", "a", "--keep-latest", "3", "--tensorboard-dir", "b"])}
    )
    config = build({}, saved)
    assert config.parallel == ParallelConfig()
    assert config.checkpoint == CheckpointConfig()
    assert config.logging.tensorboard_dir == ""


def test_how_often_a_run_saves_and_on_how_much_it_validates_outlives_a_restart() -> None:
    words = ["--preset", "nexusformer-240m", "--save", "a", "--load", "auto"]
    first = build(given_flags([*words, "--eval-iters", "5"]))
    again = build(given_flags([*words, "--eval-interval", "7"]), first)
    assert first.checkpoint.save_interval == again.checkpoint.save_interval == 1000
    assert again.logging == dataclasses.replace(first.logging, eval_interval=7)


def test_a_saved_configuration_is_read_back_as_it_was() -> None:
    assert RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(SAVED)))) == SAVED
    for broken in ({}, {"preset": "x", "model": 3}, {**dataclasses.asdict(SAVED), "model": {"nexus_z": 1}}):
        with pytest.raises((KeyError, TypeError)):
            RunConfig.from_dict(broken)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--global-batch-size 16 --train-tokens 20480", 20 + 10),
        ("--global-batch-size 4 --train-tokens 20480", 20 + 40),
        ("--global-batch-size 16 --train-tokens 20481", 20 + 11),
        ("--seq-length 128 --train-tokens 20480", 20 + 10),
        ("--seq-length 48 --train-tokens 20480", 20 + 27),
        ("--train-tokens 10240", 20),
        ("--train-tokens 1", 20),
        ("--global-batch-size 16 --train-samples 320", 20 + 10),
        ("--global-batch-size 16", 20 + 10),  # the budget of the first part holds
        ("--global-batch-size 16 --train-iters 40", 40),
        ("--global-batch-size 16 --rampup-batch-size 8 8 176 --train-samples 320", 20 + 2 + 9),
    ],
)
def test_a_budget_counts_what_was_read_and_not_the_steps_that_it_took(words: str, steps: int) -> None:
    sizes = ["--seq-length", "64", "--global-batch-size", "8"]
    saved = build(given_flags([*sizes, "--train-tokens", "20480"]))
    assert saved.training.train_iters == 40
    consumed = Consumed(step=20, samples=160, tokens=10_240)
    assert build(given_flags(words.split()), saved, consumed).training.train_iters == steps
    assert build({}, saved, consumed) == saved


def test_a_schedule_in_samples_takes_the_place_of_one_in_steps_and_the_reverse() -> None:
    steps = parse("--lr-warmup-iters", "7", "--lr-decay-iters", "9")
    samples = build(given_flags(["--lr-warmup-samples", "70"]), steps)
    assert (samples.optimizer.lr_warmup_iters, samples.optimizer.lr_decay_iters) == (0, 0)
    assert samples.optimizer.lr_warmup_samples == 70 and samples.optimizer.counts_samples
    again = build(given_flags(["--lr-warmup-iters", "3"]), samples).optimizer
    assert (again.lr_warmup_iters, again.lr_warmup_samples, again.counts_samples) == (3, 0, False)


def test_flags_that_repeat_the_checkpoint_s_model_are_welcome() -> None:
    words = ["--preset", "nexusformer-20m", "--vocab-size", "97", "--nexus-inner-norm"]
    assert build(given_flags(words), SAVED) == SAVED


def test_flags_that_contradict_the_checkpoint_s_model_are_all_named() -> None:
    words = ["--preset", "nexusformer-tiny", "--num-layers", "4", "--no-nexus-inner-norm"]
    with pytest.raises(ConfigError) as caught:
        build(given_flags(words), SAVED)
    assert len(caught.value.problems) == 3
    assert "--preset 'nexusformer-tiny' is not the checkpoint's 'nexusformer-20m'" in caught.value.problems[0]
    assert "--num-layers 4 is not the checkpoint's 6: drop the flag" in caught.value.problems[1]
    assert "--nexus-inner-norm False is not the checkpoint's True" in caught.value.problems[2]
