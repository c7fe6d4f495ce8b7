"""One rank of the resume tests: runs each given case as the command does, several runs in one process.

Usage: resume_worker.py CASES.json; a case is a command line, `--load` among it where it resumes, the verb
`unlearn` before it where it unlearns.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_nexus import log
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.rules import check
from megatron_nexus.models import parameters
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training import console as console_module
from megatron_nexus.training import run as run_module
from megatron_nexus.training.run import train
from tests.support.warm_server import call_in_fork


def draw_nothing(*_: object) -> NoReturn:
    """In the place of initial values, which a checkpoint would overwrite."""
    raise AssertionError("a run that resumes draws no weights")


def run_one(argv: list[str], index: int) -> None:
    """Run a command line, at a port of its own."""
    world = read_world(os.environ)
    world = replace(world, master_port=world.master_port + index)
    log.configure(is_main_rank=world.rank == 0)
    verb, argv = (argv[0], argv[1:]) if argv[0] == "unlearn" else ("train", argv)
    command = read_train_command(argv, verb)
    config, checkpoint, start = command.config, command.checkpoint, command.start
    check(config, world.size)
    if checkpoint is not None:
        parameters.local_values = draw_nothing
    begins = start is not None and start.begins_unlearning
    train(config, world, checkpoint, argv, begins_unlearning=begins, faults=command.faults)


def main() -> None:
    # What a run measures and draws is in no law here, and takes a third of the time of so small a run.
    run_module.gemm_flops_per_s = lambda mesh, precision: 1.0
    console_module.plot_losses = lambda folder, entropy, title: folder
    for index, argv in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        call_in_fork(run_one, argv, index)


if __name__ == "__main__":
    main()
