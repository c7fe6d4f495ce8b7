"""What the paths of a growth say: the fits of each group, as text and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_nexus.analysis.components import Components, grassmann, principal_components
from megatron_nexus.analysis.cycles import Cycle, FisherG, fisher_g, fit_cycle
from megatron_nexus.analysis.path import NO_SHIFT_P, Path, Point
from megatron_nexus.analysis.samples import ALL
from megatron_nexus.analysis.scaling_law import ScalingLaw, fit_scaling_law
from megatron_nexus.base.table import table

MEASURES = ("U", "AUC", "+-", "NOC", "+-", "d1", "d2", "d3", "R")


@dataclass(frozen=True)
class PathReport:
    """The fits of a path; text says why one is missing. (Euclidean, Grassmann) distances by step."""

    path: Path
    cycle: Cycle | str
    fisher: FisherG | str
    law: ScalingLaw | str
    distances: dict[int, tuple[float, float]]

    @property
    def p_values(self) -> list[float | None]:
        """The larger p-value of each fit by its two null models; None where it could not be made."""
        shares = [
            None if isinstance(self.cycle, str) else self.cycle.p_chosen,
            None if isinstance(self.fisher, str) else self.fisher.p_detrended,
        ]
        law = None if isinstance(self.law, str) else max(self.law.p_shuffled, self.law.p_trend)
        return [*(None if s is None else max(s.white_noise, s.random_walk) for s in shares), law]


@dataclass(frozen=True)
class GroupReport:
    """A group of matrices: its components over all runs, and the path of each run."""

    group: str
    components: Components | str
    paths: tuple[PathReport, ...]


def make_report(paths: Sequence[Path], seed: int) -> list[GroupReport]:
    """Fit everything to paths of any groups and runs; the groups in the order in which they first occur."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.group, []).append(path)
    reports = []
    for name, members in groups.items():
        components = principal_components([row for path in members for row in path.changes.values()], seed)
        reports.append(GroupReport(name, components, tuple(_fit(path, components, seed) for path in members)))
    return reports


def _fit(path: Path, components: Components | str, seed: int) -> PathReport:
    known = [(point.snapshot, point.r) for point in path.points if point.r is not None]
    times, radii = [float(snapshot.tokens) for snapshot, _ in known], [r for _, r in known]
    with_loss = [(float(s.tokens), r, s.loss) for s, r in known if s.loss is not None]
    distances = {}
    if isinstance(components, Components):
        zero = components.state((0.0, 0.0, 0.0))
        for step, changes in path.changes.items():
            z = components.state(changes)
            distances[step] = float(np.linalg.norm(z - zero)), grassmann(z, zero)
    return PathReport(
        path,
        fit_cycle(times, radii, seed),
        fisher_g(times, radii, seed),
        fit_scaling_law(with_loss, seed),
        distances,
    )


def report_lines(reports: Sequence[GroupReport]) -> Iterator[str]:
    """Yield the report: all matrices at each checkpoint with every fit, then a line for each other group."""
    rows = []
    for report in reports:
        if report.group == ALL:
            yield from _whole_lines(report)
        elif not report.group.startswith("layers."):  # a single matrix: in the JSON
            for fitted in report.paths:
                tests = ["-" if p is None else f"{p:.2g}" for p in fitted.p_values]
                rows.append((report.group, fitted.path.run, *_measures(fitted.path.points[-1]), *tests))
    if rows:
        yield "the last checkpoint of each run; p of each fit, the larger of its two null models:"
        yield from table([("matrices", "run", *MEASURES, "cycle", "Fisher", "law"), *rows], "<<>")
        yield ""
    yield _chance(reports)


def _whole_lines(report: GroupReport) -> Iterator[str]:
    for fitted in report.paths:
        yield f"{fitted.path.run}: all matrices of the kinds that grew"
        head = ("step", "tokens", "base", "grown", *MEASURES, "Euclid", "Grassmann")
        yield from table([head, *(_point_row(fitted, point) for point in fitted.path.points)], ">")
        for line in (*fitted.path.notes, fitted.cycle, fitted.fisher, fitted.law):
            yield f"  {line}"
        yield ""
    yield f"{report.components}"
    yield ""


def _point_row(fitted: PathReport, point: Point) -> tuple[str, ...]:
    snapshot = point.snapshot
    compared, distances = snapshot.comparison, fitted.distances.get(snapshot.step, (None, None))
    numbers = (snapshot.step, snapshot.tokens, compared.n_base, compared.n_grown)
    return (*(f"{n:,}" for n in numbers), *_measures(point), *map(_number, distances))


def _measures(point: Point) -> tuple[str, ...]:
    c = point.snapshot.comparison
    numbers = (c.auc, c.auc_error, c.noc, c.noc_error, point.d1, point.d2, point.d3, point.r)
    return (f"{c.u:.2g}", *map(_number, numbers))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.2e}"


def _chance(reports: Sequence[GroupReport]) -> str:
    """Say how many p-values below 0.05 chance alone explains."""
    fits = [p for report in reports for fitted in report.paths for p in fitted.p_values if p is not None]
    if not fits:
        return "no fit could be made: the lines above say what each lacks"
    below = sum(p < NO_SHIFT_P for p in fits)
    return (
        f"{len(fits)} fits of all groups, single matrices among them: {below} with p < {NO_SHIFT_P}, "
        f"{NO_SHIFT_P * len(fits):.1f} expected where nothing is there; the smallest p is {min(fits):.2g}, "
        f"{min(1.0, min(fits) * len(fits)):.2g} after Bonferroni's correction"
    )


def report_json(reports: Sequence[GroupReport]) -> list[dict[str, Any]]:
    """Return the report as JSON: every number of every group, and what the text says of its fits."""
    return [
        asdict(report)
        | {
            "sentences": [str(report.components)]
            + [str(fit) for fitted in report.paths for fit in (fitted.cycle, fitted.fisher, fitted.law)]
        }
        for report in reports
    ]
