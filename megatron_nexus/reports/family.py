"""Which of the runs was grown from which, and where both stand at the growth and after it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from megatron_nexus.reports.recorded_run import Growth, RecordedRun

Curve = Mapping[int, float]
"""Values by step."""
SEAM_STEPS = 20
"""On each side of a growth, of which losses are averaged."""


@dataclass(frozen=True)
class Seam:
    """A growth between a run and its parent; `parent` is None where its folder is not among the runs."""

    run: RecordedRun
    growth: Growth
    parent: RecordedRun | None

    @property
    def loss_before(self) -> float | None:
        """The mean training loss of the parent's last steps before the growth."""
        losses = self.parent.losses if self.parent else {}
        last = [
            losses[s] for s in range(self.growth.step - SEAM_STEPS + 1, self.growth.step + 1) if s in losses
        ]
        return mean(last) if last else None

    @property
    def first_loss(self) -> float | None:
        """The training loss of the first step after the growth."""
        return self.run.losses.get(self.growth.step + 1)

    @property
    def parent_first_loss(self) -> float | None:
        """The parent's loss of the same step, of the same samples, where it was continued."""
        return self.parent.losses.get(self.growth.step + 1) if self.parent else None

    @property
    def gaps(self) -> dict[str, dict[int, float]]:
        """Validation loss minus the continued parent's, by set and step; below 0 growth is ahead."""
        theirs = self.parent.validations if self.parent else {}
        found = {name: self._gap(own, theirs.get(name, {})) for name, own in self.run.validations.items()}
        return {name: gap for name, gap in found.items() if gap}

    @property
    def training_gap(self) -> dict[int, float]:
        """Training loss minus the continued parent's, by step: of the same samples where both read alike."""
        return self._gap(self.run.losses, self.parent.losses if self.parent else {})

    def _gap(self, own: Curve, theirs: Curve) -> dict[int, float]:
        return {s: x - theirs[s] for s, x in own.items() if s in theirs and s > self.growth.step}

    def gap_at_equal_flops(self, name: str) -> dict[int, tuple[float, float]]:
        """Return (FLOPs, loss minus the parent's at the same FLOPs) by step, of a validation set.

        The parent's loss is interpolated between its validations; beyond them there is nothing to say.
        """
        if self.parent is None:
            return {}
        spent, found = self.parent.flops(), {}
        curve = sorted((spent[s], x) for s, x in self.parent.validations.get(name, {}).items() if s in spent)
        own = self.run.flops()
        for step, loss in self.run.validations.get(name, {}).items():
            theirs = _interpolated(curve, own[step]) if step in own and step > self.growth.step else None
            if theirs is not None:
                found[step] = own[step], loss - theirs
        return found


def _interpolated(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    for (a, low), (b, high) in itertools.pairwise(curve):
        if a <= at <= b:
            return low + (high - low) * (at - a) / (b - a) if b > a else low
    return None


def parent_of(run: RecordedRun, growth: Growth, runs: Sequence[RecordedRun]) -> RecordedRun | None:
    """Return the run that was grown, among `runs`; paths may be those of another machine or folder."""
    by_path = {other.folder.resolve(): other for other in runs if other is not run}
    for path in (growth.parent_run, run.folder.parent / growth.parent_run.name):
        if path.resolve() in by_path:
            return by_path[path.resolve()]
    return None


def seams(runs: Sequence[RecordedRun]) -> list[Seam]:
    """Return the latest growth of each run that has grown."""
    return [Seam(run, run.growths[-1], parent_of(run, run.growths[-1], runs)) for run in runs if run.growths]


def hours_before(run: RecordedRun, runs: Sequence[RecordedRun]) -> float | None:
    """Return the hours that a run's parents took up to the growth; None where they are unknown."""
    if not run.growths:
        return 0.0
    growth = run.growths[-1]
    parent = parent_of(run, growth, runs)
    if parent is None or growth.step not in (hours := parent.hours()):
        return None
    earlier = hours_before(parent, runs)
    return None if earlier is None else earlier + hours[growth.step]
