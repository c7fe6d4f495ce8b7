"""The hours of runs by what they went into, and the share that trained (ETTR)."""

from collections.abc import Sequence

from megatron_nexus.reports.html_parts import cell_of, paragraph, section, table
from megatron_nexus.reports.recorded_run import RecordedRun


def hours_section(runs: Sequence[RecordedRun]) -> str:
    """Return the table of where time went; "" where no run has recorded it."""
    known = [(run.name, run.times) for run in runs if run.times is not None]
    if not known:
        return ""
    head = ("run", "ETTR, %", "starts", "hours in all", "training", *known[0][1].parts)
    rows = [
        [
            name,
            cell_of(100 * times.ettr, ".1f"),
            cell_of(times.starts, ","),
            *(cell_of(s / 3600, ".3g") for s in (times.total_s, times.productive_s, *times.parts.values())),
        ]
        for name, times in known
    ]
    said = (
        "ETTR, the effective training time ratio: hours of the steps that were kept, of all hours from the "
        "first start of the run to its last record. Hours also of the columns behind it."
    )
    return section("Where the time went", table(head, rows), paragraph(said))
