"""The losses of runs against tokens, FLOPs and hours, and tables of where each stands and its time went."""

from collections.abc import Iterator, Sequence
from statistics import mean

from megatron_nexus.reports.chart import Axis, Series, legend, line_chart, scaled_axis
from megatron_nexus.reports.family import hours_before
from megatron_nexus.reports.html_parts import Content, cell_of, charts, paragraph, section, table
from megatron_nexus.reports.recorded_run import RecordedRun

LAST_STEPS = 20
LOSS = Axis("loss", "nats per token")
TOKENS = ((1.0, ""), (1e3, "thousands"), (1e6, "millions"), (1e9, "billions"), (1e12, "trillions"))
FLOPS = (
    (1e9, "10^9"),
    (1e12, "10^12 (TFLOP)"),
    (1e15, "10^15 (PFLOP)"),
    (1e18, "10^18 (EFLOP)"),
    (1e21, "10^21 (ZFLOP)"),
)
HOURS = ((1 / 3600, "seconds"), (1 / 60, "minutes"), (1.0, "hours"))


def overview(runs: Sequence[RecordedRun]) -> str:
    """Return the table of runs."""
    sets = list(dict.fromkeys(name for run in runs for name in run.validations))
    losses = (f"training loss, last {LAST_STEPS}", *(f"{name} loss" for name in sets))
    head = ("run", "parameters", "steps", "tokens", "FLOPs", "hours, own", *losses, "state")
    return section("Runs", table(head, (_row(run, sets) for run in runs)))


def _row(run: RecordedRun, sets: Sequence[str]) -> Iterator[Content]:
    steps, losses = [*run.losses], [*run.losses.values()]
    yield run.name
    yield cell_of(run.parameters, ",")
    yield cell_of(steps[-1] if steps else 0, ",")
    yield cell_of(_last(run.tokens()), ",.0f")
    yield cell_of(_last(run.flops()), ".4g")
    yield cell_of(_last(run.hours()), ".3g")
    yield cell_of(mean(losses[-LAST_STEPS:]) if losses else None, ".4f")
    for name in sets:
        yield cell_of(_last(run.validations.get(name, {})), ".4f")
    wanted = run.config.training.train_iters if run.config else None
    reached = steps[-1] if steps else 0
    yield (
        "unknown" if wanted is None else "finished" if reached >= wanted else f"at {reached:,} of {wanted:,}"
    )


def _last(curve: dict[int, float]) -> float | None:
    return [*curve.values()][-1] if curve else None


def loss_curves(runs: Sequence[RecordedRun]) -> str:
    """Return the charts of training and validation losses."""
    hours, unknown = {}, []
    for run in runs:
        before = hours_before(run, runs)
        hours[run.name] = {step: (before or 0.0) + value for step, value in run.hours().items()}
        if before is None:
            unknown.append(run.name)
    scales = {
        "tokens": ({run.name: run.tokens() for run in runs}, TOKENS),
        "FLOPs": ({run.name: run.flops() for run in runs}, FLOPS),
        "time": (hours, HOURS),
    }
    figures, drawn = [], []
    for kind in ("training loss", *dict.fromkeys(name for run in runs for name in run.validations)):
        for title, (places, units) in scales.items():
            series = [_series(run, number, kind, places[run.name]) for number, run in enumerate(runs)]
            largest = max((x for one in series for x, _ in one.points), default=0.0)
            begun = [places[run.name].values() for run in runs if run.growths]  # after the growth
            marks = [min(values) for values in begun if values]
            axis = scaled_axis(title, largest, units)
            figures.append(line_chart(f"{kind} against {title}", axis, LOSS, series, marks))
            drawn += [one for one in series if one.points]
    said = [
        "Tokens and FLOPs include those of the runs that a run was grown from; dotted lines are growths. Of "
        "more than 240 steps a line shows means."
    ]
    if unknown:
        said.append(f"Hours before the growth are not known, and left out, of: {', '.join(unknown)}.")
    return section("Losses", legend(drawn), charts(*figures), *map(paragraph, said))


def _series(run: RecordedRun, number: int, kind: str, places: dict[int, float]) -> Series:
    curve = run.losses if kind == "training loss" else run.validations.get(kind, {})
    points = [(places[step], loss) for step, loss in curve.items() if step in places]
    return Series(run.name, points, number, dots=kind != "training loss")


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
