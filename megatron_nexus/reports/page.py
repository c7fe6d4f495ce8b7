"""The page: its sections in order, in one HTML document that loads nothing."""

import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from megatron_nexus import __version__
from megatron_nexus.base.durable import atomic_file
from megatron_nexus.errors import flag_errors
from megatron_nexus.reports.curves import hours_section, loss_curves, overview
from megatron_nexus.reports.divergence import Divergence, divergence_section
from megatron_nexus.reports.family import seams
from megatron_nexus.reports.growths import gap_section, metrics_section, seam_section
from megatron_nexus.reports.html_parts import notes, paragraph
from megatron_nexus.reports.origins import commands_section, differences_section, lineage_section
from megatron_nexus.reports.recorded_run import RecordedRun


def make_page(
    runs: Sequence[RecordedRun],
    title: str,
    output: Path,
    divergences: Sequence[Divergence],
    reload_s: int,
) -> str:
    """Return the document of `runs`; `divergences` are those of grown models from their parents.

    A browser loads it again every `reload_s` seconds, if above 0.
    """
    made = f"Made by megatron_nexus {__version__}."
    if reload_s:
        made += f" Of {time.strftime('%Y-%m-%d %H:%M:%S')}, loaded again every {reload_s} s."
    reload = f'<meta http-equiv="refresh" content="{reload_s}">' if reload_s else ""
    style = files("megatron_nexus.reports").joinpath("page.css").read_text(encoding="utf-8")
    grown = seams(runs)
    said = [f"{run.name}: {note}" for run in runs for note in run.notes]
    sections = [
        overview(runs),
        loss_curves(runs),
        hours_section(runs),
        seam_section(grown) if grown else "",
        gap_section(grown),
        divergence_section(divergences),
        *(metrics_section(run) for run in runs),
        lineage_section(runs),
        differences_section(runs),
        commands_section(runs, output),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{reload}"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f'<div class="soft">{paragraph(made)}</div>'
        f"{notes(said)}{''.join(sections)}</body></html>\n"
    )


def write_page(page: str, output: Path) -> None:
    """Write the document, whole at every moment. Raises ConfigError where --output cannot be written."""
    with flag_errors("--output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as write:
            write(page.encode())
