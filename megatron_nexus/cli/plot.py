"""The verb `plot`: the losses of several runs in one picture and one table."""

from pathlib import Path

from megatron_nexus import log
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.training.comparison import comparison_table, plot_runs, read_runs


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "plot",
        "RUN... [flags]",
        description="Draw the losses of runs in one picture, and print where each begins and ends.",
    )
    flag = parser.add_flag
    flag("runs", "folders of runs, in order", type=Path, nargs="+", metavar="RUN")
    flag("--output", "the picture (default: losses.png)", type=Path, default=Path("losses.png"))
    flag("--title", "of the picture", default="")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus plot` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    runs = read_runs(given.runs)
    log.show(comparison_table(runs))
    plot_runs(runs, given.output, given.title)
    log.logger.info("picture: %s", given.output)
