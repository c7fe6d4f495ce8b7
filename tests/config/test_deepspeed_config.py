"""What DeepSpeed is told follows from the run's own configuration."""

import json

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.deepspeed_config import deepspeed_config
from megatron_nexus.config.rules import check


@pytest.mark.parametrize(("asked", "served"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_there_is_always_a_master_copy_so_stage_0_is_served_as_1(asked: int, served: int) -> None:
    config = build(given_flags(["--zero-stage", str(asked)]))
    assert deepspeed_config(config, 1)["zero_optimization"]["stage"] == served


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_accumulate_in_fp32_whatever_the_precision(precision: str) -> None:
    told = deepspeed_config(build(given_flags([f"--{precision}"])), 1)
    assert told["bf16"] == {"enabled": precision == "bf16"}
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in told


@pytest.mark.parametrize(
    ("words", "world_size", "data", "steps"),
    [
        ("", 1, 1, 4),
        ("", 4, 4, 1),
        ("--tp 2 --pp 2", 4, 1, 4),
        ("--tp 2 --pp 2 --micro-batch-size 4", 16, 4, 2),
        ("--global-batch-size 480 --micro-batch-size 5", 12, 12, 8),
    ],
)
def test_the_global_batch_is_micro_batch_times_copies_times_steps(
    words: str, world_size: int, data: int, steps: int
) -> None:
    config = build(given_flags(["--global-batch-size", "32", "--micro-batch-size", "8", *words.split()]))
    check(config, world_size)
    assert config.data_parallel_size(world_size) == data
    told = deepspeed_config(config, world_size)
    assert told["gradient_accumulation_steps"] == config.accumulation_steps(world_size) == steps
    micro = told["train_micro_batch_size_per_gpu"]
    assert isinstance(micro, int)
    assert told["train_batch_size"] == config.training.global_batch_size == micro * data * steps


def test_clipping_is_passed_on_and_all_of_it_is_json() -> None:
    told = deepspeed_config(build(given_flags(["--clip-grad", "0.25"])), 1)
    assert told["gradient_clipping"] == 0.25
    assert json.loads(json.dumps(told)) == told
