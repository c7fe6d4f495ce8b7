"""The verb `advise` on saved runs: what it reads, what it says, its commands, bad input answered."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.advice.run_curve import read_runs
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.cli.advise import run
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.config_file import config_text
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError, ConfigError, NexusError
from megatron_nexus.training.metrics import METRICS_FILE
from tests.support import checkpoints

STEPS, TOKENS = 400, 100
WSD = {"train_iters": STEPS, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 80, "lr": 1.0, "min_lr": 0.1}
LARGE = {"nexus_m": 30, "nexus_a": 38}
SIZES = "nexus_m=30 nexus_a=38"


def write_run(root: Path, config: RunConfig, e: float, b: float, last: int, tp: int = 1) -> None:
    """A run of the law e + b S^-0.4 + 0.16 eta, saved at steps 200 and `last`."""
    for step in sorted({min(200, last), last}):
        checkpoints.write_checkpoint(root, config, tp, step=step)
    records, area = [], 0.0
    for step in range(1, STEPS + 1):
        rate = min(1.0, 0.1 + 0.9 * (STEPS - step) / 80)
        area += rate * TOKENS
        loss = e + b * area**-0.4 + 0.16 * rate
        records.append({"step": step, "loss": loss, "learning_rate": rate, "tokens": step * TOKENS})
        records[-1]["tokens_per_s"] = 1000.0
        if step % 10 == 0:
            records.append({"name": "validation", "step": step, "validation_loss": loss})
    (root / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records if r["step"] <= last))
    (root / "config.yaml").write_text(config_text(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, by one rank and by two; runs of a target that is far better, and of one that is worse."""
    root = tmp_path_factory.mktemp("advise")
    small, large = checkpoints.configure(**WSD), checkpoints.configure(**WSD, **LARGE)
    write_run(root / "small", small, 2.9, 20, STEPS)
    write_run(root / "two", small, 2.9, 20, STEPS, tp=2)
    write_run(root / "better", large, 2.0, 40, STEPS)
    write_run(root / "worse", large, 3.2, 20, STEPS)
    write_run(root / "short", small, 2.9, 20, 4)
    write_run(root / "words", checkpoints.configure(**WSD, vocab_size=41), 2.9, 20, STEPS)
    return root


def advise(console: pytest.CaptureFixture[str], *words: str) -> dict:
    run([*words, "--json"])
    return json.loads(console.readouterr().out)


def test_a_checkpoint_is_advised_on_as_if_its_future_were_not_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    budget = str(10 * read_manifest(Path("small/iter_0000200")).progress.flops * 10)
    words = ["--target-sizes", SIZES, "--budget-flops", budget]
    now = advise(console, "small/iter_0000200", *words, "--pilots", "better")
    assert (now["answer"], now["position"]["phase"]) == ("grow now", "stable")
    target = now["targets"][0]["forecast"]
    assert target["gain"]["low"] > 0 and target["ceiling"]["high"] < 0
    other = advise(console, "two/iter_0000200", *words, "--pilots", "better")
    other["run"] = now["run"]
    assert other == now  # whatever topology wrote it
    end = advise(console, "small", *words, "--pilots", "better")
    assert (end["answer"], end["position"]["phase"]) == ("grow later", "after the decay")
    assert "small/iter_0000200 is the newest checkpoint" in end["targets"][0]["verdict"]["reasons"][0]
    useless = advise(console, "small", *words[:2], "--pilots", "worse")
    assert useless["answer"] == "never"
    assert "size is not what limits" in useless["targets"][0]["verdict"]["reasons"][0]


def test_validation_losses_are_not_compared_with_training_losses(folder: Path, tmp_path: Path) -> None:
    """Where one run has too few validations, training losses of all of them are read."""
    seldom = tmp_path / "seldom"
    shutil.copytree(folder / "better", seldom)
    records = [json.loads(line) for line in (seldom / METRICS_FILE).read_text().splitlines()]
    kept = [r for r in records if "validation_loss" not in r or r["step"] % 100 == 0]
    assert sum("validation_loss" in r for r in kept) == 4
    (seldom / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in kept))
    both = read_runs([location(str(folder / "small")), location(str(seldom))])
    assert [(run.validated, len(run.curve.points)) for run in both] == [(False, 40)] * 2
    alone = read_runs([location(str(folder / name)) for name in ("small", "better")])
    assert [run.validated for run in alone] == [True] * 2


def test_where_nothing_is_known_it_says_so_and_its_pilots_can_be_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    run(["small/iter_0000200"])
    output = console.readouterr().out
    assert "answer: cannot tell" in output
    pilots = re.findall(r"pilot, [\d.e+]+ FLOPs.*?: (.*)", output)
    assert len(pilots) == 4  # depth, D, M and A, FFN
    for command in pilots:
        words = shlex.split(command)
        config = read_train_command(words[words.index("train") + 1 :]).config
        assert config.optimizer.lr_decay_style == "WSD"
    assert config.model.ffn_hidden_size == 2 * checkpoints.SIZES["ffn_hidden_size"]


def test_the_command_of_a_growth_that_pays_can_be_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["small/iter_0000200", "--target-sizes", SIZES, "--pilots", "better", "--budget-hours", "0.2"]
    run(words)
    *_, answer, command, _ = console.readouterr().out.split("\n")
    assert answer == f"answer: grow now, {SIZES}"
    words = shlex.split(command)
    read = read_train_command(words[words.index("train") + 1 :])
    config, checkpoint = read.config, read.checkpoint
    assert config.model.nexus_m == 30 and checkpoint is not None and checkpoint.name == "iter_0000200"
    assert np.isclose(config.optimizer.lr_wsd_decay_iters, 0.2 * config.training.train_iters, atol=1)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("nowhere", CheckpointError, "nowhere: no such folder"),
        ("short", ConfigError, "short has 3 losses after its first third, 6 are needed: train it on"),
        (
            "small --budget-flops 1",
            ConfigError,
            "--budget-flops 1 is of the whole run, which has spent 1e+09",
        ),
        ("small --budget-flops -1", ConfigError, "--budget-flops"),
        ("small --target-sizes nexus_m=1", ConfigError, "1"),
        ("small --target-sizes depth=9", ConfigError, "unknown flag --depth"),
        ("small --pilots words", ConfigError, "--pilots words has --vocab-size 41, the run 37"),
        ("small --pilots small", ConfigError, "small is given twice: give each run once"),
        ("small --budget-flops 1e12 --budget-hours 3", ConfigError, "not allowed with"),
    ],
)
def test_bad_input_is_answered_at_once(
    words: str, kind: type[NexusError], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(kind, match=re.escape(expected)):
        run(words.split())
