"""The line that a run ends with is a command line that is accepted."""

import shlex
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.schedule import learning_rate
from megatron_nexus.parallel.launch_command import typed_words
from megatron_nexus.training.console import rate_note, resume_command


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


VENV = "/opt/venv/bin"
DEEPSPEED = [f"{VENV}/python", f"{VENV}/deepspeed", "--num_gpus", "2", "pretrain_nexus.py", "--tp", "2"]
DEEPSPEED_NODE = [
    "python",
    "-u",
    "-m",
    "deepspeed.launcher.launch",
    "--world_info=e30=",
    "pretrain_nexus.py",
    "--tp",
    "2",
]
RANK = ["/opt/venv/bin/python", "-u", "pretrain_nexus.py", "--local_rank=1", "--tp", "2"]
NEXUS_RANK = [f"{VENV}/python", "-u", f"{VENV}/nexus", "--local_rank=1", "train", "--tp", "2"]
NEXUS_NODE = [*DEEPSPEED_NODE[:5], f"{VENV}/nexus", "train", "--tp", "2"]
NEXUS_LAUNCH = [f"{VENV}/python", f"{VENV}/nexus", "launch", "--num_gpus", "2", "train", "--tp", "2"]
MODULE_RANK = [f"{VENV}/python", "-u", "-m", "megatron_nexus", "--local_rank=1", "train", "--tp", "2"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([["python3", "pretrain_nexus.py", "--tp", "2"]], "python3 pretrain_nexus.py"),
        ([RANK, DEEPSPEED_NODE, DEEPSPEED, ["bash"]], "deepspeed --num_gpus 2 pretrain_nexus.py"),
        ([RANK, ["/usr/bin/torchrun", "--standalone", *RANK[2:]]], "torchrun --standalone pretrain_nexus.py"),
        (
            [RANK, ["mpirun", "-n", "2", "python", "pretrain_nexus.py", "--tp", "2"]],
            "mpirun -n 2 python pretrain_nexus.py",
        ),
        ([MODULE_RANK], f"{VENV}/python -m megatron_nexus train"),
        ([[f"{VENV}/python", f"{VENV}/nexus", "train", "--tp", "2"]], "nexus train"),
        ([NEXUS_RANK, NEXUS_NODE, NEXUS_LAUNCH], "nexus launch --num_gpus 2 train"),
        (
            [MODULE_RANK, [f"{VENV}/python", "-m", "megatron_nexus", *NEXUS_LAUNCH[2:]]],
            f"{VENV}/python -m megatron_nexus launch --num_gpus 2 train",
        ),
        ([NEXUS_RANK, ["mpirun", "-n", "2", "nexus", "train", "--tp", "2"]], "mpirun -n 2 nexus train"),
        (
            [MODULE_RANK, ["torchrun", "--standalone", "-m", "megatron_nexus", "train", "--tp", "2"]],
            "torchrun --standalone -m megatron_nexus train",
        ),
        # Neither a shell that ran the line nor another program with the same flags.
        ([RANK, ["bash", "-c", "pretrain_nexus.py", "--tp", "2"]], f"{VENV}/python pretrain_nexus.py"),
        (
            [RANK, ["timeout", "60", "deepspeed", "pretrain_nexus.py", "--tp", "2"]],
            f"{VENV}/python pretrain_nexus.py",
        ),
    ],
)
def test_the_line_starts_as_it_was_typed(lines: list[list[str]], words: str) -> None:
    script = "pretrain_nexus.py" if "pretrain" in words else f"{VENV}/nexus"
    assert shlex.join(typed_words(lines, script, ["--local_rank=1", "--tp", "2"])) == words


@pytest.mark.parametrize(
    ("words", "step", "jumps"),
    [
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4", 100, True),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4", 50, False),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant", 100, False),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 100", 100, False),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4 --lr-decay-style WSD", 100, True),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4 --lr-warmup-samples 64", 100, True),
        ("--train-iters 100 --lr 1e-3 --min-lr 1e-4 --lr-decay-samples 1600", 100, False),
    ],
)
def test_going_on_past_a_finished_decay_says_what_the_rate_does(words: str, step: int, jumps: bool) -> None:
    config = build(given_flags(shlex.split(words)))
    note = rate_note(config, step)
    assert (note is not None) is jumps
    if note is not None:
        # What it offers: the rate stays.
        unit, size = ("samples", config.training.global_batch_size) if "samples" in words else ("iters", 1)
        kept = build(given_flags(shlex.split(f"{words} --lr-decay-{unit} {step * size}")))
        assert f"--lr-decay-{unit} {step * size} keeps it" in note
        ended = learning_rate(config.optimizer, step * size, step * size)
        assert learning_rate(kept.optimizer, (step + 1) * size, 2 * step * size) == ended
