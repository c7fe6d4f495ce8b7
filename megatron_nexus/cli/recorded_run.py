"""One side of `nexus compare`: the ranks that train a few steps and record them into a folder."""

import argparse
import os
import signal
import sys
from dataclasses import replace

from megatron_nexus import log
from megatron_nexus.base.invocation import program_words
from megatron_nexus.cli.rank_process import importing_torch, run_rank
from megatron_nexus.cli.run_files import open_files
from megatron_nexus.cli.train import state_opener
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.unlearning_samples import UnlearningSamples
from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.local_ranks import run_local_ranks
from megatron_nexus.parallel.world import read_world

PRECISION_FLAGS = ("--precision", "--bf16", "--fp32")


def record(own: argparse.Namespace, flags: list[str], argv: list[str]) -> None:
    """Record a run with the `flags` of train as one of its ranks, or start its ranks on this machine.

    `own` are the flags of compare, `argv` the whole command line. Raises ConfigError and what train raises.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of a rank that waits for others, at once
    world = read_world(os.environ)
    log.configure(is_main_rank=world.rank == 0)
    command = read_train_command(flags)
    if command.dry_run or command.faults:
        raise ConfigError("--dry-run and --inject belong to nexus train: drop them, or run that")
    float64 = not any(word.split("=")[0] in PRECISION_FLAGS for word in flags)
    command = replace(command, config=_recorded_config(command.config, float64))
    ranks = own.world_size or max(world.size, command.config.model_parallel_size)
    check(command.config, ranks)
    if world.size == 1 and ranks > 1:
        code = run_local_ranks(ranks, [*program_words("compare"), *argv])
        if code:
            sys.exit(code)
        return
    if world.size != ranks:
        raise ConfigError(f"--world-size {ranks} is not the {world.size} ranks that were started: drop it")
    if world.local_rank == 0 and own.record.exists() and any(own.record.iterdir()):
        raise ConfigError(f"--record {own.record} is not empty: give a new folder, or remove it")
    run_data = open_files(command, world)
    assert not isinstance(run_data, UnlearningSamples), "of the verb train"
    with importing_torch():
        from megatron_nexus.comparison.record_steps import RecordSettings, record_steps
    settings = RecordSettings(own.record, own.steps, own.samples, float64)

    def task() -> None:
        opener, tokenizer = state_opener(command.start), command.tokenizer_record
        record_steps(command.config, world, command.checkpoint, settings, tokenizer, run_data, opener)

    run_rank(task, world)


def _recorded_config(config: RunConfig, float64: bool) -> RunConfig:
    """Return the configuration with what hooks and float64 need: nothing compiled, no kernel of a library."""
    training = replace(
        config.training, compile=False, spike_policy="none", cross_entropy_fusion_impl="native"
    )
    optimizer = config.optimizer
    if float64:
        training = replace(training, precision="fp32", norm_impl="torch")
        optimizer = replace(optimizer, optimizer_impl="torch")
    logging = replace(config.logging, eval_tasks="")
    return replace(config, training=training, optimizer=optimizer, logging=logging)
