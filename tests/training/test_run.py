"""The line that a run ends with is a command line that is accepted."""

import shlex
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.training.run import resume_command


@pytest.mark.parametrize(
    ("words", "step", "kept"),
    [
        ("--train-iters 9 --tp 2", 5, "--train-iters 9 --tp 2 --load runs/a"),
        ("--train-iters 9 --tp 2", 9, "--tp 2 --load runs/a --train-iters 18"),
        ("--train-tokens=40960 --seq-length 128", 10, "--seq-length 128 --load runs/a --train-iters 20"),
        ("--train-tokens 40960 --save runs/a", 10, "--load runs/a --train-iters 20"),
        ("--load old --reset-optimizer --save=runs/a --train-iters 9", 5, "--train-iters 9 --load runs/a"),
    ],
)
def test_the_resume_line_says_the_length_and_the_folder_once(words: str, step: int, kept: str) -> None:
    config = build(given_flags(shlex.split(words)))
    line = resume_command(
        config, ["deepspeed", "pretrain_nexus.py"], shlex.split(words), Path("runs/a"), step
    )
    assert line == f"deepspeed pretrain_nexus.py {kept}"
    given_flags(shlex.split(kept))
