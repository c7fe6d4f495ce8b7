"""What a growth did to a run: the seam, the gap to the continued parent, new weights against old ones."""

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from megatron_nexus.reports.chart import Axis, Series, legend, line_chart
from megatron_nexus.reports.curves import LOSS
from megatron_nexus.reports.family import SEAM_STEPS, Seam
from megatron_nexus.reports.html_parts import Content, cell_of, charts, details, paragraph, section, table
from megatron_nexus.reports.recorded_run import RecordedRun
from megatron_nexus.training.metrics import means_by_kind

STEP = Axis("optimizer step")
NUMBERS = {
    "grad_ratio": Axis("gradient RMS, new / old", "ratio"),
    "update_ratio_new": Axis("update / weight RMS, new elements", "ratio"),
    "update_ratio_old": Axis("update / weight RMS, old elements", "ratio"),
    "post_rms_new": Axis("activations, new units", "RMS"),
    "post_rms_old": Axis("activations, old units", "RMS"),
    "dead_share_new": Axis("dead new units", "share"),
    "effective_rank": Axis("effective rank, whole matrix", "rank"),
    "stable_rank": Axis("stable rank, whole matrix", "rank"),
    "row_cosine_max": Axis("new row nearest to an old one", "largest |cosine|"),
    "source_cosine_mean": Axis("copied rows beside their sources", "cosine, mean"),
}
LOGARITHMIC = ("grad_ratio", "update_ratio_new", "update_ratio_old")


def seam_section(found: Sequence[Seam]) -> str:
    """Return the table of growths and the losses around each."""
    head = ("run", "grown at step", "sizes", "recipe", f"loss before, {SEAM_STEPS} steps", "first loss after")
    figures = [_seam_chart(seam) for seam in found]
    curves = [Series(name, (), colour) for colour, name in enumerate(("parent", "grown"))]
    return section(
        "Growths",
        table((*head, "parent's loss of that step"), map(_seam_row, found)),
        legend(curves) if any(figures) else "",
        charts(*figures),
        *(
            paragraph(f"{seam.run.name}: its parent {seam.growth.parent_run} is not among the runs given.")
            for seam in found
            if seam.parent is None
        ),
    )


def _seam_row(seam: Seam) -> Iterator[Content]:
    settings = seam.growth.settings
    yield seam.run.name
    yield cell_of(seam.growth.step, ",")
    yield str(seam.growth)
    yield ", ".join(
        f"{name} {settings[name]}" for name in ("init", "depth_init", "moments") if name in settings
    )
    yield cell_of(seam.loss_before, ".5f")
    yield cell_of(seam.first_loss, ".5f")
    yield cell_of(seam.parent_first_loss, ".5f")


def _seam_chart(seam: Seam) -> str:
    step = seam.growth.step
    near = range(step - SEAM_STEPS + 1, step + SEAM_STEPS + 1)
    curves = [seam.parent.losses if seam.parent else {}, seam.run.losses]
    series = [
        Series(name, [(float(s), curve[s]) for s in near if s in curve], colour)
        for colour, (name, curve) in enumerate(zip(("parent", "grown"), curves, strict=True))
    ]
    return line_chart(f"{seam.run.name}: around step {step:,}", STEP, LOSS, series, [step + 0.5])


def gap_section(found: Sequence[Seam]) -> str:
    """Return how far each grown run is from its parent, continued without growth."""
    rows: list[list[Content]] = []
    figures = []
    for seam in found:
        tokens = seam.run.tokens()
        for name, gaps in seam.gaps.items():
            at_flops = seam.gap_at_equal_flops(name)
            for step, gap in gaps.items():
                at_equal = cell_of(at_flops[step][1] if step in at_flops else None, "+.4f")
                numbers = [cell_of(step, ","), cell_of(tokens.get(step), ",.0f"), cell_of(gap, "+.4f")]
                rows.append([seam.run.name, name, *numbers, at_equal])
        points = [(float(step), gap) for step, gap in seam.training_gap.items()]
        axis = Axis("grown minus parent", "nats per token")
        figures.append(
            line_chart(f"{seam.run.name}: training loss gap", STEP, axis, [Series("gap", points, 0)])
        )
    if not rows and not any(figures):
        return ""
    head = ("run", "set", "step", "tokens", "gap at equal tokens", "gap at equal FLOPs")
    return section(
        "Gap to the continued parent",
        paragraph(
            "Loss minus that of the parent trained on without growth, nats per token: below 0 the grown run "
            "is ahead. At equal FLOPs the parent's loss is interpolated, and missing beyond its last one."
        ),
        table(head, rows),
        charts(*figures),
    )


def metrics_section(run: RecordedRun) -> str:
    """Return the growth metrics of a run: charts by kind of matrix, and its last record in full."""
    metrics = run.growth_metrics
    if not metrics:
        return ""
    by_step = {step: _by_group(found) for step, found in metrics.items()}
    groups = list(dict.fromkeys(group for found in by_step.values() for group in found))
    figures, drawn = [], []
    for name, axis in NUMBERS.items():
        series = []
        for colour, group in enumerate(groups):
            points = [(float(s), v[group][name]) for s, v in by_step.items() if name in v.get(group, {})]
            series.append(Series(group, points, colour))
        figures.append(line_chart(axis.title, STEP, Axis(axis.unit), series, log=name in LOGARITHMIC))
        drawn += [one for one in series if one.points]
    last = max(metrics)
    names = list(dict.fromkeys(name for numbers in metrics[last].values() for name in numbers))
    rows = (
        [tensor, *(cell_of(numbers.get(name), ".4g") for name in names)]
        for tensor, numbers in metrics[last].items()
    )
    return section(
        f"Growth metrics of {run.name}",
        paragraph(
            "New: what the latest growth added; means over layers, and over Q, K and V. Matrices that have "
            "no new elements are in the table alone."
        ),
        legend(drawn),
        charts(*figures),
        details(f"every tensor at step {last:,}", table(("tensor", *names), rows)),
    )


def _by_group(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the means over layers, and over Q, K and V, of the matrices that have new elements."""
    found: dict[str, list[dict[str, float]]] = {}
    for kind, numbers in means_by_kind(metrics).items():
        if "elements_new" in numbers and not kind.endswith("gain"):
            group = re.sub(r"\b[qkv]\.", "qkv.", kind)
            found.setdefault(group, []).append(numbers)
    return {
        group: {name: mean(n[name] for n in members if name in n) for name in {k for n in members for k in n}}
        for group, members in found.items()
    }
