"""The path of a growth: what was measured at each checkpoint, relative to the first after the growth.

    d1 = U_t / U_0 - 1    d2 = NOC_t / NOC_0 - 1    d3 = (Avg_t - Avg_0) / Avg_0    R = sqrt(d1^2 + d2^2)

Avg is the mean accuracy in tasks, or minus the validation loss, so that d3 above zero is better.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot

from megatron_nexus.analysis.two_samples import Comparison

NO_SHIFT_P = 0.05


@dataclass(frozen=True)
class Snapshot:
    """What was measured at a checkpoint; `loss` in nats per token, `performance` the larger the better."""

    step: int
    tokens: int
    comparison: Comparison
    loss: float | None = None
    performance: float | None = None


@dataclass(frozen=True)
class Point:
    """A snapshot relative to the reference; None where one of the two lacks what it needs."""

    snapshot: Snapshot
    d1: float | None
    d2: float | None
    d3: float | None
    r: float | None


@dataclass(frozen=True)
class Path:
    """The points of a group of matrices of a run, from the reference on, which comes first."""

    run: str
    group: str
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def changes(self) -> dict[int, tuple[float, float, float]]:
        """(d1, d2, d3) by step, of the points after the reference that have all three."""
        found = {point.snapshot.step: (point.d1, point.d2, point.d3) for point in self.points[1:]}
        return {
            step: (a, b, c)
            for step, (a, b, c) in found.items()
            if a is not None and b is not None and c is not None
        }


def make_path(run: str, group: str, snapshots: Sequence[Snapshot]) -> Path:
    """Return the path of snapshots in the order of their steps, of which there is at least one."""
    usable = [i for i, s in enumerate(snapshots) if s.comparison.noc and s.comparison.u > 0.0]
    first = usable[0] if usable else 0
    since = snapshots[first:]
    scored = [snapshot for snapshot in since if snapshot.performance is not None]
    points = tuple(_relative(since[0], snapshot, scored[0] if scored else since[0]) for snapshot in since)
    notes = list(_notes(snapshots, first if usable else None))
    if scored and scored[0] is not since[0]:
        notes.append(f"d3 is relative to step {scored[0].step:,}, the first with a record in the metrics")
    return Path(run, group, points, tuple(notes))


def _relative(reference: Snapshot, snapshot: Snapshot, scored: Snapshot) -> Point:
    zero, now = reference.comparison, snapshot.comparison
    d1 = now.u / zero.u - 1.0 if zero.u > 0.0 else None
    d2 = now.noc / zero.noc - 1.0 if zero.noc and now.noc is not None else None
    d3 = None
    if scored.performance and snapshot.performance is not None:
        d3 = (snapshot.performance - scored.performance) / abs(scored.performance)
    return Point(snapshot, d1, d2, d3, hypot(d1, d2) if d1 is not None and d2 is not None else None)


def _notes(snapshots: Sequence[Snapshot], first: int | None) -> Iterator[str]:
    """Yield what must be known to read a path."""
    count, why = len(snapshots), "all weights of one side are equal (no density), or U is 0 in float64"
    if first is None:
        yield f"no d1, d2, R: at each checkpoint {why}"
    elif first:
        yield f"the reference is step {snapshots[first].step:,}: before it {why}"
    silent = sum(snapshot.comparison.u > NO_SHIFT_P for snapshot in snapshots)
    if silent == count:
        yield (
            f"U is above {NO_SHIFT_P} at all {count} checkpoints: no shift is detected; without one U is "
            "uniform noise between 0 and 1, and d1 and R say nothing about the weights"
        )
    elif silent:
        yield f"U is above {NO_SHIFT_P}, no shift is detected, at {silent} of {count} checkpoints"
    missing = [f"{s.step:,}" for s in snapshots if s.performance is None]
    if missing:
        yield (
            f"no d3 at {len(missing)} of {count} checkpoints (step {missing[0]} first), of which the metrics "
            "have no record: train with an --eval-interval that divides --save-interval"
        )
