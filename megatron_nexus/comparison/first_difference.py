"""First difference: compares two recordings tensor by tensor, in the order of execution.

A tensor differs where elements lie further apart than rounding explains: rtol x its largest element, or,
where sums have cancelled, rtol x 1e-4 x the largest element of all tensors of its kind so far.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_nexus.comparison.recording import Array, Copies, Key, LogicalAxis, Part, Phase, Place, Recording
from megatron_nexus.errors import ConfigError, raise_problems

Mask = npt.NDArray[np.bool_]

RTOL = {"float64": 1e-9, "fp32": 1e-4, "bf16": 0.1}
"""Tolerance by the type of a recording; topologies differ by 1e-14 in float64, which later steps lift."""
CANCELLED = 1e-4
"""Where sums cancel, rounding is that of their terms: so this share of the phase's largest element counts."""


@dataclass(frozen=True)
class Difference:
    """A tensor that differs: the worst element, and where all that do are."""

    key: Key
    largest: float
    tolerance: float
    values: tuple[float, float]
    index: tuple[int, ...]
    count: int
    size: int
    places: str
    """The elements that differ, by axis."""
    hints: tuple[str, ...]
    """Which ranks hold them, and what they have in common."""
    copies: tuple[str, Copies] | None = None
    """The side whose ranks disagree, and which of them most; None: they agree."""
    only: str = ""
    """The side that alone has the tensor, as where a gradient does not come."""

    @property
    def apart(self) -> float:
        """How far apart the sides are, or the copies of one of them."""
        return max(self.largest, self.copies[1].difference if self.copies else 0.0)


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two recordings, in the order of execution."""

    differences: tuple[Difference, ...]
    before: int
    """Tensors that agree before the first that differs."""
    compared: int
    closest: float
    """The largest difference of those, as a share of the tensor's largest element."""


def differing(a: Mapping[str, object], b: Mapping[str, object], remedy: str) -> list[str]:
    """Return what is different in A and B, each with what to do."""
    return [
        f"{name} is {a.get(name)} in A and {b.get(name)} in B: {remedy}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def compare(a: Recording, b: Recording, rtol: float | None = None) -> Comparison:
    """Compare the steps that both recordings have. Raises ConfigError: not of one model and one batch."""
    problems = differing(a.run.model, b.run.model, "compare runs of one model")
    names = ("seq_length", "global_batch_size", "samples")
    ours, theirs = ({name: getattr(one.run, name) for name in names} for one in (a, b))
    raise_problems([*problems, *differing(ours, theirs, "record both with the same")])
    allowed = rtol or max(RTOL[a.run.dtype], RTOL[b.run.dtype])
    in_a, in_b = set(a.keys), set(b.keys)
    keys = [key for key in in_order(a.keys, b.keys) if key.step <= min(a.run.steps, b.run.steps)]
    differences: list[Difference] = []
    largest: dict[str, float] = {}
    before, closest = 0, 0.0
    for key in keys:
        if key not in in_a or key not in in_b:
            side = "A" if key in in_a else "B"
            differences.append(Difference(key, np.inf, 0.0, (np.nan, np.nan), (), 0, 0, "", (), only=side))
            continue
        (x, copies_a), (y, copies_b) = a.assemble(key), b.assemble(key)
        if x.shape != y.shape:
            raise ConfigError(f"{key.name} is {x.shape} in A and {y.shape} in B: compare one model")
        scale = float(np.nanmax(np.abs(np.stack([x, y])), initial=0.0))
        kind = f"{key.step} {key.phase} {key.name.rpartition('.')[2] if key.phase is Phase.OPTIMIZER else ''}"
        largest[kind] = max(largest.get(kind, 0.0), scale)
        tolerance = allowed * max(scale, CANCELLED * largest[kind])
        apart = np.abs(x - y)
        wrong = ~(apart <= tolerance) & ~(np.isnan(x) & np.isnan(y)) & (x != y)
        bad = next(
            ((side, c) for side, c in (("B", copies_b), ("A", copies_a)) if c and c.difference > tolerance),
            None,
        )
        if not wrong.any() and bad is None:
            if not differences:
                before += 1
                if scale:
                    closest = max(
                        closest, float(np.nanmax(apart, initial=0.0)) / max(scale, tolerance / allowed)
                    )
            continue
        differences.append(_difference(key, a, b, x, y, wrong, tolerance, bad))
    return Comparison(tuple(differences), before, len(keys), closest)


def in_order(ours: Sequence[Key], theirs: Sequence[Key]) -> list[Key]:
    """Return all tensors of two recordings, in the order of the first; others after what they follow."""
    known, followers, last = set(ours), dict[Key | None, list[Key]](), None
    for key in theirs:
        if key in known:
            last = key
        else:
            followers.setdefault(last, []).append(key)
    return [*followers.get(None, []), *(one for key in ours for one in (key, *followers.get(key, [])))]


def _difference(
    key: Key,
    a: Recording,
    b: Recording,
    ours: Array,
    theirs: Array,
    wrong: Mask,
    tolerance: float,
    bad: tuple[str, Copies] | None,
) -> Difference:
    apart = np.where(wrong, np.abs(ours - theirs), -1.0)
    apart[np.isnan(apart)] = np.inf
    index = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    hints: list[str] = []
    if wrong.any():
        for side, recording in (("A", a), ("B", b)):
            hints += _holders(side, recording.parts(key), wrong)
        hints += _pattern(a.axes(key), ours, theirs, wrong)
    if bad is not None:
        side, recording, other = ("A", a, theirs) if bad[0] == "A" else ("B", b, ours)
        hints += _missing_sum(side, recording, key, other, tolerance)
    return Difference(
        key=key,
        largest=max(float(apart.max()), 0.0),
        tolerance=tolerance,
        values=(float(ours[index]), float(theirs[index])),
        index=index,
        count=int(wrong.sum()),
        size=wrong.size,
        places=", ".join(_places(a.axes(key), wrong, a.run.samples)),
        hints=tuple(hints),
        copies=bad,
    )


def _places(axes: Sequence[LogicalAxis], wrong: Mask, samples: Sequence[int]) -> Iterator[str]:
    """Yield where elements differ along each axis; nothing of an axis along which all do."""
    for number, axis in enumerate(axes):
        others = tuple(other for other in range(len(axes)) if other != number)
        found = np.flatnonzero(wrong.any(axis=others))
        if len(found) in (0, axis.size):
            continue
        name, indices = axis.name, [int(index) for index in found]
        if axis.name == "sample":
            indices = [samples[index] for index in indices]
        elif axis.group > 1 and axis.size > axis.group:
            heads = sorted({index // axis.group for index in indices})
            if len(heads) == axis.size // axis.group:
                continue
            name, indices = f"{axis.name} head", heads
        yield f"{name} {_ranges(indices)}"


def _ranges(indices: Sequence[int]) -> str:
    """Return ascending numbers in words: 0 to 3, 7, and 12 more."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs]
    return ", ".join([*words[:4], *([f"and {len(words) - 4} more"] if len(words) > 4 else [])])


def _holders(side: str, parts: Sequence[Part], wrong: Mask) -> Iterator[str]:
    """Yield which ranks hold what differs, where others hold nothing of it."""
    hit: list[Place] = []
    free: list[Place] = []
    for part in parts:
        (hit if wrong[part.box.index].any() else free).append(part.place)
    hit_ranks = {place.rank for place in hit}
    clean = [place for place in free if place.rank not in hit_ranks]
    if not clean:
        return
    for coordinate in ("tp", "dp", "pp"):
        theirs = {getattr(place, f"{coordinate}_rank") for place in hit}
        if not theirs & {getattr(place, f"{coordinate}_rank") for place in clean}:
            yield f"in {side} all of it is on {coordinate} rank {_ranges(sorted(theirs))}"
            return
    yield f"in {side} all of it is on rank {_ranges(sorted(hit_ranks))}"


def _pattern(axes: Sequence[LogicalAxis], ours: Array, theirs: Array, wrong: Mask) -> Iterator[str]:
    """Yield what all elements that differ have in common: a factor, or places that are swapped."""
    a, b = ours[wrong], theirs[wrong]
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return
    large = np.abs(a) > 1e-3 * np.abs(a).max()
    if large.sum() > 1 or a.size == ours.size == 1:
        ratios = b[large] / a[large]
        if np.ptp(ratios) <= 1e-5 * np.abs(ratios).max():
            yield f"B is {ratios.mean():.6g} x A"
    last = axes[-1]
    if last.group > 1 and last.size > last.group:
        heads_a, heads_b = (x.reshape(*x.shape[:-1], -1, last.group) for x in (ours, theirs))
        count = heads_a.shape[-2]
        moved = []
        for head in range(count):
            one = heads_b[..., head, :]
            if np.allclose(one, heads_a[..., head, :], rtol=1e-6):
                continue
            same = [j for j in range(count) if np.allclose(one, heads_a[..., j, :], rtol=1e-6)]
            if same:
                moved.append(f"head {head} of B is head {same[0]} of A")
        if moved:
            yield "; ".join(moved)


def _missing_sum(side: str, recording: Recording, key: Key, other: Array, tolerance: float) -> Iterator[str]:
    """Yield that the copies of one side's ranks add up to the other side's tensor."""
    by_rank: dict[int, Array] = {}
    for part in recording.parts(key):
        whole = by_rank.setdefault(part.place.tp_rank, np.zeros(other.shape))
        index, share = part.box.index, recording.values(part)
        whole[index] = whole[index] + share if part.is_share else share
    total = sum(by_rank.values(), np.zeros(other.shape))
    if len(by_rank) > 1 and np.abs(total - other).max(initial=0.0) <= 100 * tolerance:
        other_side = "A" if side == "B" else "B"
        yield (
            f"the copies of the {len(by_rank)} tp ranks of {side} add up to {other_side}: "
            "a sum over ranks is missing"
        )
