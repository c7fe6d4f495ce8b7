"""What a command line of `nexus train` means: which checkpoint it starts from, and how."""

import shutil
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.errors import ConfigError
from tests.support import checkpoints

GROW = ["--grow", "nexus_m=20", "--reset-optimizer"]


def _start(*words: str) -> tuple[Path | None, bool, bool]:
    """The checkpoint, whether it is grown now, and whether its optimizer state is reset."""
    read = read_train_command(list(words))
    grows = read.start is not None and read.start.growth is not None
    assert grows == bool(read.config.checkpoint.grow)
    checkpoint = read.checkpoint
    assert checkpoint is None or isinstance(checkpoint, Path)
    return checkpoint, grows, read.config.checkpoint.reset_optimizer


def test_a_command_that_grows_while_loading_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    config = checkpoints.configure()
    old = checkpoints.write_checkpoint(tmp_path / "old", config)
    command = ["--load", str(tmp_path / "old"), *GROW, "--save", str(tmp_path / "new")]
    assert _start(*command) == (old, True, True)
    checkpoints.grow(old, tmp_path / "new", config, {"nexus_m": 20})
    new = newest_checkpoint(tmp_path / "new")
    assert _start(*command) == (new, False, False)
    # Where a file asks for the growth, too.
    (tmp_path / "run.yaml").write_text("checkpoint:\n  grow: nexus_m=20\n")
    again = read_train_command(["--config", str(tmp_path / "run.yaml"), *command[:2], *command[-2:]])
    assert again.start is not None and again.start.has_grown
    # Not where another growth is asked for, or another run's checkpoint was grown.
    assert _start(*command, "--grow", "nexus_m=22") == (old, True, True)
    assert _start(*command, "--grow", "nexus_m=20 init=out_rand") == (old, True, True)
    # What the default stands for may be said, and what an earlier version did by default may go on.
    assert _start(*command, "--grow", "nexus_m=20 init=in_rand") == (new, False, False)
    earlier = {"init": "out_rand", "moments": "kept"}
    begun = [*command[:-1], str(tmp_path / "begun")]
    checkpoints.grow(old, tmp_path / "begun", config, {"nexus_m": 20}, **earlier)
    assert _start(*begun) == (newest_checkpoint(tmp_path / "begun"), False, False)
    with pytest.raises(ConfigError, match="has these sizes already"):
        _start("--load", str(tmp_path / "new"), *GROW, "--save", str(tmp_path / "new"))
    # Sizes of the smaller run may stay on the command line, its preset too, before and after.
    sizes = ["--preset", config.preset, "--nexus-m", str(config.model.nexus_m)]
    assert _start(*command, *sizes) == (new, False, False)
    assert _start(*command[:-1], str(tmp_path / "other"), *sizes) == (old, True, True)
    with pytest.raises(ConfigError, match="--nexus-m 19 is not the checkpoint's 20"):
        _start(*command, "--nexus-m", "19")
    # The checkpoint that was grown need not be there any longer.
    shutil.rmtree(tmp_path / "old")
    assert _start(*command) == (new, False, False)
    # A reset without growth is what it says.
    assert _start("--load", str(tmp_path / "new"), "--reset-optimizer") == (new, False, True)


def test_load_auto_needs_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.write_checkpoint(
        tmp_path / "runs" / "nexusformer-tiny-20260101-000000", checkpoints.configure()
    )
    with pytest.raises(ConfigError, match="--load auto needs --save"):
        read_train_command(["--load", "auto"])
    assert read_train_command(["--load", "auto", "--save", "other"]).checkpoint is None
