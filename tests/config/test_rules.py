"""Every impossible configuration is refused before anything starts, with value, rule and remedy."""

import dataclasses
from functools import cache

import pytest

from megatron_nexus.config import command_line
from megatron_nexus.config.command_line import build, given_flags, make_parser
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.model_rules import divisors
from megatron_nexus.config.rules import check, config_warnings
from megatron_nexus.config.run_config import SECTIONS
from megatron_nexus.errors import ConfigError

# What the rules below are about; `words` come after it and win. The rest is the default preset's.
BASE = (
    "--num-layers 4 --num-attention-heads 4 --seq-length 128 --micro-batch-size 8 --global-batch-size 32 "
    "--lr 0.003 --min-lr 0.0003"
)


def problems(words: str, world_size: int = 1) -> list[str]:
    try:
        check(build(given_flags([*BASE.split(), *words.split()])), world_size)
    except ConfigError as error:
        return error.problems
    return []


# Flags, world size, what the one problem must say: the value, the rule, the remedy.
REFUSED = [
    ("--tp 3", 3, ["--tp 3", "divide --num-attention-heads 4", "use 1, 2, 4"]),
    ("--tp 8", 8, ["--tp 8", "divide --num-attention-heads 4", "use 1, 2, 4"]),
    ("--pp 5", 5, ["--pp 5", "--num-layers 4", "use at most 4"]),
    *(
        (f"--{flag} {10**26}", 1, [f"--{flag} 1", f"{2**48:,}", "give a smaller number"])
        for flag in ("train-iters", "hidden-size", "num-attention-heads", "seed", "keep-every")
    ),
    ("--hidden-size 100000000000000", 1, ["--num-layers x the widths", "5.8e+17", "give less"]),
    ("--train-iters 200000000000000", 1, ["--train-iters x --global-batch-size", "8.2e+17", "give less"]),
    ("--num-layers 10001", 1, ["--num-layers 10001", "at most 10,000"]),
    ("--attention-inner cross", 1, ["--attention-inner cross", "--attention-order 2 and above", "drop"]),
    ("--attention-gate", 1, ["--attention-gate", "--attention-order 2 and above", "raise it"]),
    ("--attention-order 10001", 1, ["--attention-order 10001", "at most 10,000"]),
    ("--num-query-groups 3", 1, ["--num-query-groups 3", "--num-attention-heads 4", "use 1, 2, 4"]),
    ("--num-query-groups 2 --tp 4", 4, ["--tp 4", "divide --num-query-groups 2", "use 1, 2"]),
    ("--projection linear --nexus-inner-norm", 1, ["--nexus-inner-norm", "this is linear", "drop the flag"]),
    (
        "--add-qkv-bias",
        1,
        ["--add-qkv-bias belongs to --projection linear", "this is nexus", "drop the flag"],
    ),
    ("--qk-layernorm-all-heads", 1, ["--qk-layernorm-all-heads", "give both, or neither"]),
    (
        "--qk-layernorm --qk-layernorm-all-heads --base-kv-channels 16",
        1,
        ["--base-kv-channels 16", "drop the flag"],
    ),
    ("--rope-low-freq-factor 5", 1, ["--rope-low-freq-factor 5.0", "below --rope-high-freq-factor 4.0"]),
    ("--sliding-window -1", 1, ["--sliding-window -1 must not be negative"]),
    ("--sliding-window 9 --attention-order 2", 1, ["--sliding-window 9", "belongs to --attention-order 1"]),
    ("--pattention-slots 9", 1, ["--pattention-slots 9", "this is nexus", "give 0"]),
    ("--projection pattention", 1, ["--pattention-slots 0 must be positive"]),
    ("--base-pattention-slots 9", 1, ["--base-pattention-slots 9", "above --pattention-slots 0"]),
    ("--base-ffn-hidden-size 9", 1, ["--base-ffn-hidden-size 9", "this is swiglu", "give 0"]),
    ("--ffn-nexus-m 9", 1, ["--ffn-nexus-m 9", "this is swiglu", "--feed-forward nexus"]),
    ("--feed-forward nexus", 1, ["--ffn-nexus-m 0 must be positive"]),
    ("--base-nexus-m 200", 1, ["--base-nexus-m 200", "above --nexus-m 160", "use at most 160"]),
    ("--nexus-inner-norm-scale width", 1, ["belongs to --nexus-inner-norm", "add it"]),
    (
        "--normalization NonParametricLayerNorm --norm-impl apex",
        1,
        ["--norm-impl apex has RMSNorm", "use --norm-impl torch"],
    ),
    ("--base-hidden-size 200", 1, ["--base-hidden-size 200", "above --hidden-size 128", "use at most 128"]),
    ("--base-kv-channels 34", 1, ["--base-kv-channels 34", "above --kv-channels 32", "use at most 32"]),
    ("--base-kv-channels 7", 1, ["--base-kv-channels 7 must be even", "use 8"]),
    ("--zero-stage 4", 1, ["--zero-stage 4", "at most 3"]),
    ("--zero-stage -1", 1, ["--zero-stage -1", "0 or above"]),
    ("--zero-stage 2 --pp 2", 2, ["--zero-stage 2", "needs --pp 1", "use --zero-stage 1, or --pp 1"]),
    ("--zero-stage 3 --pp 4", 4, ["--zero-stage 3", "--pp is 4", "use --zero-stage 1, or --pp 1"]),
    ("--optimizer-impl apex --zero-stage 3", 1, ["--optimizer-impl apex", "--zero-stage 3", "1 or 2"]),
    ("--sequence-parallel", 1, ["--sequence-parallel", "--tp is 1", "drop the flag"]),
    ("--sequence-parallel --tp 4 --seq-length 30", 4, ["--seq-length 30", "multiple of --tp 4", "use 28"]),
    ("--sequence-parallel --tp 4 --seq-length 3", 4, ["--seq-length 3", "multiple of --tp 4", "use 4"]),
    ("--tp 2", 3, ["world has 3 ranks", "--tp 2 x --pp 1 = 2", "start 2 ranks or change"]),
    ("--tp 2 --pp 2", 1, ["world has 1 rank,", "--tp 2 x --pp 2 = 4", "start 4 ranks or change"]),
    ("--tp 2 --pp 2", 11, ["world has 11 ranks", "= 4", "start 8 ranks or change"]),
    ("--global-batch-size 30", 1, ["--global-batch-size 30", "8 x data parallel 1 = 8", "use 24 or 32"]),
    ("--global-batch-size 8", 4, ["--global-batch-size 8", "8 x data parallel 4 = 32", "use 32"]),
    ("--micro-batch-size 64", 1, ["--global-batch-size 32", "micro batch 64", "use 64"]),
    ("--rampup-batch-size 8 9 90", 1, ["--rampup-batch-size 8 9 90", "do not reach", "such as 24"]),
    (
        "--rampup-batch-size 8 8 90",
        2,
        ["--rampup-batch-size 8 8 90", "data parallel 2 = 16", "use such as 16 16"],
    ),
    ("--lr-warmup-samples 9 --lr-warmup-iters 9", 1, ["in samples", "in steps", "all of it in one"]),
    ("--kv-channels 33", 1, ["--kv-channels 33", "even", "use 34"]),
    ("--min-lr 0.5", 1, ["--min-lr 0.5", "above --lr 0.003", "use at most 0.003"]),
    ("--adam-beta1 1", 1, ["--adam-beta1 1.0", "[0, 1)", "give such as 0.9"]),
    ("--adam-beta2 -0.5", 1, ["--adam-beta2 -0.5", "[0, 1)", "give such as 0.9"]),
    ("--lr nan", 1, ["--lr nan", "positive", "give a finite number above 0"]),
    ("--lr inf", 1, ["--lr inf", "positive", "give a finite number above 0"]),
    ("--clip-grad inf", 1, ["--clip-grad inf", "negative", "give a finite number, 0 or above"]),
    ("--eval-tasks-limit 9", 1, ["--eval-tasks-limit 9", "belongs to --eval-tasks"]),
    ("--eval-tasks ,", 1, ["--eval-tasks ','", "names no task"]),
    ("--eval-tasks piqa --data-path a", 1, ["--eval-tasks piqa", "as --tokenizer-model"]),
    ("--spike-policy skip --spike-rolling-interval 1", 1, ["--spike-rolling-interval 1", "give 2 or more"]),
    ("--spike-policy rewind", 1, ["--save-interval 0", "give --save-interval"]),
    ("--keep-every 100", 1, ["--keep-every 100", "give --keep-latest too"]),
]


@pytest.mark.parametrize(("words", "world_size", "expected"), REFUSED)
def test_a_broken_rule_is_told_with_value_rule_and_remedy(
    words: str, world_size: int, expected: list[str]
) -> None:
    found = problems(words, world_size)
    assert len(found) == 1, found
    assert all(part in found[0] for part in expected), found[0]


def test_every_number_is_checked_against_the_bounds_of_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "make_parser", cache(make_parser))  # one for all: they are many
    for kind in SECTIONS.values():
        for field in dataclasses.fields(kind):
            if not isinstance(field.default, int | float) or isinstance(field.default, bool):
                continue
            names = (flag_of(field.name), *field.metadata["aliases"])
            found = problems(f"{names[0]}=-1")
            assert sum(problem.startswith(names) for problem in found) == 1, (field.name, found)
            zero = [problem for problem in problems(f"{names[0]} 0") if problem.startswith(names)]
            needed = field.name in ("nexus_m", "nexus_a")  # of the preset's projections
            assert len(zero) == (field.metadata["bounds"].positive or needed), (field.name, zero)


@pytest.mark.parametrize("words", ["--ffn-nexus-m=-3", "--pattention-slots=-3", "--nexus-m=-3"])
@pytest.mark.parametrize("kind", ["", "--feed-forward nexus --projection pattention --ffn-nexus-m 9"])
def test_one_number_out_of_bounds_is_one_problem(words: str, kind: str) -> None:
    found = problems(f"{kind} {words}")
    flag = words.split("=")[0]
    assert [problem for problem in found if problem.startswith(flag)] == found[:1], found
    assert "0 or above" in found[0]


def test_all_problems_are_reported_at_once() -> None:
    found = problems("--lr 0 --min-lr 0 --tp 3 --pp 9 --kv-channels 7 --seed=-4", world_size=5)
    for part in ("--lr 0.0", "--tp 3", "--pp 9", "--kv-channels 7", "--seed -4", "the world has 5 ranks"):
        assert any(part in problem for problem in found), (part, found)
    assert str(ConfigError(found)).startswith(f"{len(found)} problems")


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("", 1),
        ("", 4),
        ("--tp 4 --pp 4 --micro-batch-size 1", 16),
        ("--tp 2 --sequence-parallel --zero-stage 3", 2),
        ("--pp 4 --zero-stage 0", 4),
        ("--adam-beta1 0 --adam-beta2 0 --min-lr 0.003 --clip-grad 0", 2),
        # Logical widths need not divide: they are padded in memory.
        ("--tp 4 --hidden-size 130 --nexus-m 131 --nexus-a 133 --ffn-hidden-size 347 --vocab-size 4099", 4),
    ],
)
def test_what_is_possible_passes(words: str, world_size: int) -> None:
    assert problems(words, world_size) == []


def test_the_remedy_for_a_count_lists_its_divisors() -> None:
    assert divisors(12) == "1, 2, 3, 4, 6, 12"
    assert divisors(1) == "1"


def test_a_warm_up_that_outlasts_the_run_is_noted_wherever_it_begins() -> None:
    def noted(words: str) -> list[str]:
        return [
            note for note in config_warnings(build(given_flags(words.split()))) if "--lr-warmup-iters" in note
        ]

    assert noted("--train-iters 20 --lr-warmup-iters 20") == [
        "--lr-warmup-iters 20 is not over when the run of 20 iterations ends"
    ]
    assert noted("--train-iters 20 --lr-warmup-iters 5 --lr-start-iter 15") == [
        "--lr-warmup-iters 5, from --lr-start-iter 15 on, is not over when the run of 20 iterations ends"
    ]
    assert not noted("--train-iters 20 --lr-warmup-iters 5 --lr-start-iter 14")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--lr-decay-iters 5 --lr-warmup-iters 5", "--lr-decay-iters 5"),
        ("--lr-decay-iters 20 --lr-start-iter 16 --lr-warmup-iters 4", "--lr-decay-iters 20"),
        ("--lr-decay-iters 21 --lr-start-iter 16 --lr-warmup-iters 4", ""),
        ("--lr-decay-samples 64 --lr-warmup-samples 80", "--lr-decay-samples 64"),
        ("--lr-wsd-decay-iters 10", "--lr-wsd-decay-iters 10"),
        ("--lr-wsd-decay-samples 10 --lr-decay-style linear", "--lr-wsd-decay-samples 10"),
        ("--lr-wsd-decay-iters 10 --lr-decay-style WSD", ""),
    ],
)
def test_a_schedule_that_is_probably_not_meant_is_noted(words: str, flag: str) -> None:
    noted = config_warnings(build(given_flags(f"--train-iters 100 {words}".split())))
    assert [note.split(" ")[:2] for note in noted] == ([flag.split(" ")] if flag else [])
