"""A configuration file sets what flags set, loses against them, and has its mistakes named."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_nexus.cli.verbs import VERBS
from megatron_nexus.config.command_line import build, given_flags, make_parser, merge_settings
from megatron_nexus.config.config_file import config_text, read_config_file
from megatron_nexus.config.files_config import CheckpointConfig
from megatron_nexus.config.megatron_flags import _remedies, instead_of_preprocessing, replacement_hint
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import SECTIONS, RunConfig
from megatron_nexus.errors import ConfigError, path_errors


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def run_config(path: Path, *words: str) -> RunConfig:
    return build(merge_settings(read_config_file(path), given_flags(words)))


def test_a_file_wins_over_the_preset_and_a_flag_over_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "preset: nexusformer-20m\nmodel: {nexus_m: 420, nexus_a: 500}\n"
        "optimizer:\n  lr: 1e-4\n  min_lr: 0\ndata:\n  data_path: [0.7, a, 0.3, b]\ntraining:\n",
    )
    config = run_config(path, "--nexus-a", "512")
    assert config.preset == "nexusformer-20m"
    assert (config.model.num_layers, config.model.nexus_m, config.model.nexus_a) == (6, 420, 512)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-4, 0.0)
    assert isinstance(config.optimizer.min_lr, float)
    assert config.data.data_path == ("0.7", "a", "0.3", "b")
    assert run_config(path, "--preset", "nexusformer-tiny").model.num_layers == 4


def test_what_a_run_writes_is_read_back_whole(tmp_path: Path) -> None:
    words = "--preset nexusformer-20m --nexus-inner-norm --lr 1e-7 --data-path 0.7 a 0.3 b --save x --load y"
    config = build(given_flags(words.split()))
    back = run_config(write(tmp_path, config_text(config)))
    assert dataclasses.replace(config, checkpoint=CheckpointConfig()) == back
    assert config.checkpoint != back.checkpoint, "the folders are each run's own"
    for section in SECTIONS:
        assert f"{section}:" in config_text(config)


@pytest.mark.parametrize(
    ("text", "words", "iterations"),
    [
        ("training: {train_tokens: 100B, seq_length: 4096, global_batch_size: 256}", "", 95368),
        ("training: {train_iters: 7}", "--train-tokens 1M", 245),
        ("training: {train_tokens: 100B}", "--train-iters 3", 3),
        ("preset: nexusformer-240m", "--train-tokens 4096", 1),
        ("training: {train_samples: 1000, global_batch_size: 64}", "", 16),
        ("training: {train_tokens: 100B}", "--train-samples 320", 10),
    ],
)
def test_a_run_s_length_is_told_in_iterations_or_tokens(
    tmp_path: Path, text: str, words: str, iterations: int
) -> None:
    assert run_config(write(tmp_path, text), *words.split()).training.train_iters == iterations


@pytest.mark.parametrize("tokens", ["many", "0", "1.5", "-3"])
def test_tokens_that_are_no_number_are_named(tokens: str) -> None:
    with pytest.raises(ConfigError, match=f"--train-tokens {tokens} is not a number of tokens"):
        build(given_flags([f"--train-tokens={tokens}"]))


def test_tokens_and_iterations_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--train-iters and --train-tokens both say .* give one of them"):
        given_flags(["--train-tokens", "1M", "--train-iters", "3"])


@pytest.mark.parametrize("budget", ["--train-tokens 1M", "--train-samples 70"])
def test_a_budget_is_written_as_it_was_given(tmp_path: Path, budget: str) -> None:
    config = build(given_flags(budget.split()))
    text = config_text(config)
    assert "train_iters" not in text and budget.split()[1] in text
    assert run_config(write(tmp_path, text)).training == config.training


def test_the_file_of_a_run_that_began_grown_is_read_back_under_its_name(tmp_path: Path) -> None:
    config = build(given_flags(["--nexus-m", "176", "--load", "old", "--grow", "nexus_m=176"]))
    grown = dataclasses.replace(config, preset="nexusformer-tiny-grown")
    back = run_config(write(tmp_path, config_text(grown)))
    assert dataclasses.replace(grown, checkpoint=CheckpointConfig()) == back, "growing happens once"


WRONG = [
    ("model: {num_layer: 3}", ["unknown model.num_layer: did you mean num_layers?"]),
    ("modle: {}", ["unknown section 'modle': did you mean model?"]),
    ("num_layers: 3", ["num_layers stands outside its section: write it under model:"]),
    ("preset: nexusformer-1t", ["unknown preset 'nexusformer-1t'"]),
    ("preset: [a]", ["unknown preset ['a']"]),
    ("training: {train_iters: 3, train_tokens: 1M}", ["train_tokens and train_iters", "keep one"]),
    ("training: &a {seed: *a}", ["training.seed", "must be a whole number"]),
    ("model: 3", ["model 3 is not a mapping"]),
    ("model: {num_layers: twelve}", ["model.num_layers 'twelve' must be a whole number"]),
    ("model: {num_layers: 2.5}", ["model.num_layers 2.5 must be a whole number"]),
    ("model: {num_layers: true}", ["model.num_layers True must be a whole number"]),
    ("model: {nexus_inner_norm: 1}", ["model.nexus_inner_norm 1 must be true or false"]),
    ("optimizer: {lr: high}", ["optimizer.lr 'high' must be a number"]),
    ("optimizer: {lr: }", ["optimizer.lr None must be a number"]),
    ("training: {precision: fp16}", ["training.precision 'fp16' must be one of bf16, fp32"]),
    ("data: {split: 90}", ["data.split 90 must be a text in quotes"]),
    ("data: {data_path: 3}", ["data.data_path 3 must be a list of words"]),
    ("model: {num_layers: 2, num_layers: 3}", ["line 1 sets num_layers again"]),
    ("model:\n  a: [", ["run.yaml:", "correct the YAML"]),
    ("model: " + 600 * "[" + 600 * "]", ["nested too deeply"]),
    ("- 3", ["holds no sections"]),
    ("", ["holds no sections"]),
    ("model: {a: 1, b: 2}\ntraining: {seq_length: x}", ["3 problems"]),
]


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_what_a_file_gets_wrong_is_named_with_its_place(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config_file(write(tmp_path, text))
    assert all(part in str(caught.value) for part in expected), caught.value
    assert "run.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"), path_errors():
        read_config_file(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_config_file(binary)


def test_flags_of_megatron_are_answered_with_what_to_use() -> None:
    with pytest.raises(ConfigError, match="unknown flag --fp16: use --bf16") as caught:
        given_flags(["--fp16", "--use-distributed-optimizer", "--num_workers", "3"])
    assert len(caught.value.problems) == 3
    assert replacement_hint("--zzz") is None
    assert replacement_hint("--num-workers") != instead_of_preprocessing("--num-workers") == "use --workers"


def test_what_the_answers_recommend_exists_and_what_they_answer_does_not() -> None:
    ours = {flag for action in make_parser()._actions for flag in action.option_strings}
    for flag, answer in _remedies("training").items():
        assert f"--{flag}" not in ours, flag
        recommended = {word.strip(",;:") for word in answer.split() if word.startswith("--")}
        assert recommended <= ours, (flag, answer)
        assert set(re.findall("`nexus ([^`]*)`", answer)) <= VERBS.keys(), answer


COMMON = re.findall(
    r"\S+",
    """
z-loss skip-train eval-only pytorch-profiler-collect-shapes nvtx-ranges skip-iterations
moe-grouped-gemm mtp-loss-scaling-factor fp8-margin cuda-graph-scope fim-rate rl-profile
inference-max-requests ft-num-warmup-iters inprocess-restart dist-ckpt-workers ddp-num-buckets
log-energy log-straggler wandb-tags exp-avg-dtype virtual-pipeline-model-parallel-size
hybrid-layer-pattern linear-attention-freq kv-lora-rank muon-momentum tokenizer-hf-no-use-fast
full-validation grad-reduce-in-bf16 multiple-validation-sets rerun-mode error-injection-rate
cpu-offloading-num-layers yaml-cfg learning-rate max-steps per-device-train-batch-size hidden_size gpus
""",
)


def test_flags_of_megatron_s_present_list_and_of_others_are_answered() -> None:
    for flag in COMMON:
        with pytest.raises(ConfigError) as caught:
            given_flags([f"--{flag}", "1"])
        assert re.match(
            rf"unknown flag --{flag}: (use|drop it:|did you mean|start the run) ", caught.value.problems[0]
        )


def test_a_flag_of_ours_misspelt_is_not_taken_for_one_of_a_family() -> None:
    words = {"--log-intervall": "--log-interval", "--tokenizer-modle": "--tokenizer-model"}
    for wrong, right in words.items():
        with pytest.raises(ConfigError, match=f"did you mean {right}"):
            given_flags([wrong, "1"])


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))


def test_every_preset_has_an_example() -> None:
    assert {path.stem for path in EXAMPLES} == set(PRESETS)


def test_an_example_is_its_preset_s_model_and_can_run() -> None:
    for path in EXAMPLES:
        config = run_config(path)
        assert config.preset == path.stem
        assert config.model == build(given_flags(["--preset", path.stem])).model, path.stem
        for world_size in (config.model_parallel_size, 2 * config.model_parallel_size):
            check(config, world_size)
