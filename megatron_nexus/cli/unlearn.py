"""The verb `unlearn`: `train` with the losses of unlearning, on answers to forget and answers to retain.

    nexus unlearn --load runs/a --save runs/b --forget forget.jsonl --retain retain.jsonl \\
        --lr 1e-5 --train-iters 50

The run begins at iteration 0 with a new optimizer state, from the weights of --load; the checkpoints in
--save continue it, by the same command or with --load of that folder alone.
"""

from typing import NoReturn

from megatron_nexus.cli import train
from megatron_nexus.config import command_line
from megatron_nexus.config.flag_parser import FlagParser

VERB = "unlearn"


def make_parser() -> FlagParser:
    """Return the parser of the flags."""
    return command_line.make_parser(VERB)


def run(argv: list[str]) -> NoReturn:
    """Run `nexus unlearn` with the flags `argv` and end the process."""
    train.run(argv, VERB)
