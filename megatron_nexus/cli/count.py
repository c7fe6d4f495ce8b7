"""The verb `count`: what a model costs, compared with what the paper prints of it.

    nexus count --preset nexusformer-240m --tp 2 --zero-stage 1 --world-size 8
    nexus count --all

Takes every flag of a run, a checkpoint's model by --load too; starts no process group.
"""

import json

from megatron_nexus import log
from megatron_nexus.cli.arguments import positive
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.command_line import given_flags
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.rules import check
from megatron_nexus.errors import ConfigError


def run(argv: list[str]) -> None:
    """Run `nexus count` with the flags `argv`."""
    log.show(count(argv))


def count(argv: list[str]) -> list[str]:
    """Return the lines that the verb prints for its flags.

    Raises ConfigError, CheckpointError: wrong flags, as of a run; no such checkpoint.
    """
    own, flags = make_parser().parse_known_args(argv)
    if own.all:
        given = given_flags(flags)
        named = [f"--{name}" for name in ("preset", "config", "load", "grow") if name in given]
        if named:
            raise ConfigError(f"--all counts every preset: drop it, or drop {', '.join(named)}")
        from megatron_nexus.planner.cost_table import cost_table, preset_rows

        rows = preset_rows(given, own.world_size)
        return [json.dumps([row.as_json() for row in rows], indent=1)] if own.json else cost_table(rows)
    config = read_train_command(flags).config
    world_size = own.world_size or config.model_parallel_size
    check(config, world_size)
    from megatron_nexus.planner.model_cost import cost_lines, model_cost, state_per_rank

    cost = model_cost(config)
    if own.json:
        stages = [dict(memory) for memory in state_per_rank(config, world_size)]
        return [json.dumps({**cost.as_json(), "bytes_per_rank_of_each_stage": stages}, indent=1)]
    return cost_lines(cost, config, world_size)


def make_parser() -> FlagParser:
    """Return the parser of the verb's own flags; those of train follow them."""
    parser = FlagParser(
        "count",
        "[flags]",
        description="True parameters, FLOPs per token and bytes per rank of a model, against what the paper "
        "prints of it. Takes the flags of `nexus train`: --preset, --config or --load name a model; sizes "
        "such as --nexus-m change it; --tp, --pp, --zero-stage and --precision lay it on ranks; attention is "
        "counted over --seq-length.",
    )
    flag = parser.add_flag
    flag("--all", "a table of all presets, a row each", action="store_true")
    flag("--world-size", "ranks of the run (default: tp x pp)", type=positive(int))
    flag("--json", "print JSON", action="store_true")
    return parser
