"""The verb `report`: runs, growths and experiments as one HTML page that needs no network."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus import log
from megatron_nexus.cli.arguments import positive, read_text
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError
from megatron_nexus.training.comparison import find_runs, run_names

if TYPE_CHECKING:
    from megatron_nexus.reports.recorded_run import RecordedRun


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "report",
        "RUN... [flags]",
        description="Write one HTML page of runs: losses, growth metrics, lineage, settings, commands.",
    )
    flag = parser.add_flag
    flag("runs", "folders of runs, or folders that hold runs, in order", type=Path, nargs="+", metavar="RUN")
    flag("--output", "the page (default: report.html)", type=Path, default=Path("report.html"))
    flag("--title", "of the page (default: the runs' names)", default="")
    flag(
        "--held-out",
        "text on which grown models are compared with their parents (KL divergence and loss), from "
        "checkpoints",
        type=Path,
        metavar="FILE",
    )
    text = "where the tokenizer of --held-out is now (default: where the training run had it)"
    flag("--tokenizer-model", text, type=Path, metavar="FILE")
    flag(
        "--every",
        "write the page so often while the runs go on; a browser loads it by itself. Ends when all have "
        "finished, or at Ctrl-C",
        type=positive(int),
        metavar="SECONDS",
    )
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus report` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    if given.tokenizer_model is not None and given.held_out is None:
        raise ConfigError(
            f"--tokenizer-model {given.tokenizer_model} belongs to --held-out: give both, or drop it"
        )
    text = read_text("--held-out", given.held_out) if given.held_out is not None else ""
    if given.held_out is not None and given.every is not None:
        raise ConfigError(
            f"--held-out {given.held_out} loads models: give it without --every, when the runs are over"
        )
    if given.output.is_dir() or given.output.suffix not in (".html", ".htm"):
        raise ConfigError(
            f"--output {given.output} is not a name of an HTML file: give one such as report.html"
        )
    folders = find_runs(given.runs)
    with log.importing("torch"):
        from megatron_nexus.reports.divergence import measure_divergences
        from megatron_nexus.reports.family import seams
        from megatron_nexus.reports.page import make_page, write_page
        from megatron_nexus.reports.recorded_run import read_run

    def page_of(folders: Sequence[Path], reload_s: int) -> "list[RecordedRun]":
        """Write the page of the runs as they are now, and return them."""
        runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
        divergences = measure_divergences(seams(runs), text, given.tokenizer_model) if text else []
        title = given.title or ", ".join(one.name for one in runs[:4]) + (" ..." if len(runs) > 4 else "")
        write_page(make_page(runs, title, given.output, divergences, reload_s), given.output)
        return runs

    runs = page_of(folders, given.every or 0)
    for one in runs:
        for note in one.notes:
            log.logger.info("note: %s: %s", one.name, note)
    log.logger.info("%d run%s: %s", len(runs), "s" * (len(runs) != 1), given.output)
    if given.every is None:
        return
    log.logger.info("rewritten every %d s; Ctrl-C ends it", given.every)
    with suppress(KeyboardInterrupt):
        while any(one.is_unfinished for one in runs):
            time.sleep(given.every)
            runs = page_of(find_runs(given.runs), given.every)
    page_of(find_runs(given.runs), 0)
    log.logger.info("%s: no longer loaded again by itself", given.output)
