"""DeepSpeed's configuration follows from the run's own."""

import json
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.deepspeed_config import Json, deepspeed_config
from megatron_nexus.config.rules import check
from megatron_nexus.errors import ConfigError, path_errors


@pytest.mark.parametrize(("asked", "served"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_there_is_always_a_master_copy_so_stage_0_is_served_as_1(asked: int, served: int) -> None:
    config = build(given_flags(["--zero-stage", str(asked)]))
    assert deepspeed_config(config, 1)["zero_optimization"]["stage"] == served


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_accumulate_in_fp32_whatever_the_precision(precision: str) -> None:
    settings = deepspeed_config(build(given_flags([f"--{precision}"])), 1)
    bf16 = settings["bf16"]
    assert isinstance(bf16, dict) and bf16["enabled"] is (precision == "bf16")
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert "fp16" not in settings


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_communication_overlaps_on_accelerators_where_deepspeed_does_by_default(stage: int) -> None:
    """pydantic's own answer, for the configuration without the key."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = build(given_flags(["--zero-stage", str(stage)]))
    zero = {device: deepspeed_config(config, 1, device)["zero_optimization"] for device in ("cpu", "cuda")}
    assert zero["cpu"]["overlap_comm"] is False
    assert zero["cuda"]["overlap_comm"] is DeepSpeedZeroConfig(stage=stage).overlap_comm


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
    settings = deepspeed_config(config, world_size)
    assert settings["gradient_accumulation_steps"] == config.accumulation_steps(world_size) == steps
    micro = settings["train_micro_batch_size_per_gpu"]
    assert isinstance(micro, int)
    assert settings["train_batch_size"] == config.training.global_batch_size == micro * data * steps


def test_clipping_is_passed_on_and_all_of_it_is_json() -> None:
    settings = deepspeed_config(build(given_flags(["--clip-grad", "0.25"])), 1)
    assert settings["gradient_clipping"] == 0.25
    assert json.loads(json.dumps(settings)) == settings


def merged(folder: Path, given: object, *words: str) -> Json:
    path = folder / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return deepspeed_config(build(given_flags([*words, "--deepspeed_config", str(path)])), 1)


def test_a_file_sets_what_is_deepspeed_s_own_and_may_repeat_what_the_flags_say(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "none"},
        },
        "comms_logger": {"enabled": True},
        "communication_data_type": "bf16",
        "timers": {"throughput": {"enabled": True}},
    }
    plain = deepspeed_config(build(given_flags(["--zero-stage", "2"])), 1)
    zero = plain["zero_optimization"]
    assert isinstance(zero, dict) and zero["overlap_comm"] is False
    assert merged(tmp_path, given, "--zero-stage", "2") == {
        **plain,
        "zero_optimization": {**zero, "overlap_comm": True},
        "comms_logger": {"enabled": True},
        "communication_data_type": "bf16",
        "timers": {"throughput": {"enabled": True}},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_batch_size": 7}, ["train_batch_size is 7", "make it 32", "--global-batch-size"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage is 3", "make it 1", "--zero-stage"]),
        ({"fp16": {"enabled": True}}, ["fp16 cannot be set", "--bf16"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer cannot be set", "--lr"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["nothing offloaded"]),
        ({"zero_optimization": {"overlap_com": True}}, ["did you mean zero_optimization.overlap_comm?"]),
        ({"zzz": 1}, ["zzz is not supported: drop it"]),
        ({"zero_optimization": {"zzz": 1}}, ["zero_optimization.zzz is not supported: drop it"]),
        ({"zero_optimization": {"overlap_comm": "yes"}}, ["overlap_comm is 'yes'", "of type bool"]),
        ({"zero_optimization": {"reduce_bucket_size": True}}, ["reduce_bucket_size is True", "of type int"]),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, ["reduce_bucket_size is 0", "number, above 0"]),
        ({"zero_optimization": {"sub_group_size": -1}}, ["sub_group_size is -1", "number, 0 or above"]),
        (
            {"zero_optimization": {"reduce_bucket_size": float("nan")}},
            ["is not JSON (NaN is not a number of JSON)", "correct it"],
        ),
        ({"gradient_predivide_factor": 2}, ["gradient_predivide_factor is 2", "make it 1.0"]),
        ({"flops_profiler": {"enabled": "maybe"}}, ["flops_profiler.enabled is 'maybe'", "true or false"]),
        ({"communication_data_type": "half"}, ["communication_data_type is 'half'", "fp16, bf16, fp32"]),
        ("{", ["is not JSON"]),
        ("[]", ["is not a JSON object"]),
    ],
)
def test_what_a_file_may_not_set_is_named_with_both_values(
    tmp_path: Path, given: object, expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, given)
    assert all(part in str(caught.value) for part in expected), caught.value


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"missing\.json: No such file"), path_errors():
        check(build(given_flags(["--deepspeed-config", "missing.json"])), 1)


def test_weights_and_biases_is_not_begun_twice(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"wandb": {"enabled": true}}')
    words = ["--deepspeed-config", str(path), "--wandb-project", "growth"]
    with pytest.raises(ConfigError, match=r"wandb is enabled, and --wandb-project growth .*: drop one"):
        check(build(given_flags(words)), 1)
