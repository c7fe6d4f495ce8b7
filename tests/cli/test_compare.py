"""The command `nexus compare`: recordings of real ranks, runs and checkpoints, and what it refuses."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus.base.durable import LOCK_FILE
from megatron_nexus.cli.compare import _scratch_folder
from tests.support.cli import SMALL, WARM, Command, assert_refused, commands, ended, warm_ranks
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """All commands of this file, in a folder with a run `trained` of two steps."""
    for made in commands(tmp_path_factory.mktemp("compare"), tmp_path_factory.mktemp("logs")):
        code, output = made.run("--fp32 --train-iters 2 --save trained")
        assert code == 0, output
        yield made


def compare(command: Command, words: str, launcher: list[str] = WARM) -> tuple[int, str]:
    program = [str(REPOSITORY / "megatron_nexus" / "__main__.py"), "compare", *shlex.split(words)]
    return ended(command._spawn([*launcher, *program], command.folder))


def record(command: Command, folder: str, words: str, launcher: list[str] = WARM) -> None:
    code, output = compare(command, f"--record {folder} {shlex.join(SMALL)} {words}", launcher)
    assert code == 0, output


def test_recordings_of_two_worlds_agree_and_a_longer_one_is_cut(command: Command) -> None:
    record(command, "one", "--steps 1")
    record(command, "two", "--tp 2 --sequence-parallel", warm_ranks(2))
    code, output = compare(command, "one two")
    assert code == 0, output
    assert "B: tp 2 x pp 1 x dp 1, ZeRO 1, sequence parallel, float64, 2 steps" in output
    assert "no difference: 2" in output

    record(command, "seeded", "--steps 1 --seed 2")
    code, output = compare(command, "one seeded")
    assert code == 1, output
    assert "first difference: step 1, weights, embedding.weight: " in output

    code, output = compare(command, "one two --a '--tp 1'")
    assert_refused(code, output, "ConfigError", "--a: one is a recording", "drop the flags")
    code, output = compare(command, f"--record two {shlex.join(SMALL)}")
    assert_refused(code, output, "ConfigError", "--record two is not empty", "give a new folder")
    record(command, "wide", "--steps 1 --ffn-hidden-size 25")
    code, output = compare(command, "one wide")
    assert_refused(code, output, "ConfigError", "ffn_hidden_size is 24 in A and 25 in B", "one model")
    (command.folder / "wide" / "rank_00000.json").write_text("{")
    code, output = compare(command, "one wide")
    assert_refused(code, output, "ConfigError", "wide is not a complete recording", "--record")


def test_a_run_goes_on_from_its_checkpoint_on_its_mesh(command: Command) -> None:
    record(command, "loaded", "--load trained --steps 1")
    code, output = compare(command, "loaded trained --steps 1 --data-path corpus --split 8,2")
    assert code == 0, output
    code, output = compare(command, "trained trained --b '--tp 2 --micro-batch-size 3'")
    assert_refused(
        code, output, "ConfigError", "side B: --global-batch-size 4", "micro batch 3", "use 3 or 6"
    )
    assert "the world has" not in output, "a rank more is started for --tp 2"
    assert "recording" not in output, "before anything is started"
    code, output = compare(command, f"{shlex.join(SMALL)} --b '--ffn-hidden-size 25'")
    assert_refused(code, output, "ConfigError", "ffn_hidden_size is 24 in A and 25 in B", "one model")
    assert "recording" not in output, "before anything is started"


def test_wrong_words_are_refused_before_anything_is_started(command: Command) -> None:
    for words, expected in {
        "--b '--tpp 2'": ("unknown flag --tpp", "did you mean --tp?"),
        "a b c": ("3 runs were given", "compare two"),
        "--record x --a '--tp 2'": ("--record records one side", "drop"),
        "--steps 0": ("--steps", "above 0"),
    }.items():
        code, output = compare(command, words)
        assert_refused(code, output, "ConfigError", *expected)
        assert "recording" not in output or "--record" in words
    code, output = compare(command, "nowhere elsewhere")
    assert_refused(code, output, "CheckpointError", "nowhere")
    assert not Path(command.folder, "x").exists()


def test_what_a_killed_comparison_has_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "nexus-compare-killed"
    left.mkdir()
    (left / LOCK_FILE).touch()
    with _scratch_folder() as first, _scratch_folder() as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second]), "that of a living one stays"
    assert not list(tmp_path.iterdir())
