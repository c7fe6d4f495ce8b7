"""Growth of a parameter: which elements of a larger tensor are old, and what fills the new ones.

New units are appended at the end of an axis, new members at the end of each group. For a path old -> new ->
old to carry gradients without changing the function it must hold exactly one zero factor: two zeros
never train, none changes the function. So each axis is closed on one side of its new units:

    out_rand   zero where they are written, random where they are read
    in_rand    random where they are written, zero where they are read
    zero       zero everywhere: no gradient ever reaches them, because gelu(0) = 0 and silu(0) = 0

Or new units cancel, with no zero at all. What writes a unit is copied, what reads it divided:

    split      a new unit is a copy of an old one, and both share its outgoing weights w: s w and w - s w. In
               float32 fl(s w) + (w - fl(s w)) = w exactly for 1/2 <= s <= 2 (Sterbenz)
    pairs      new units come in pairs: equal random incoming weights, random outgoing ones of opposite sign

Adam divides the scale of a gradient away but not its sign: copies part at full rate only where their outgoing
weights have opposite signs, as with s = 1.5, and of three copies two have the same.

Or on neither side, and the function changes: `noise` draws a share of the old deviation, `random` the initial
values, as the released code of Tokenformer does.

The residual stream is read through norms and so is closed where it is written, whatever the choice.
A box that is new along several axes is zero only where all of them are closed by this parameter: an
axis that it leaves open has its zero elsewhere on the same path. New channels of a head do not rotate, so
they cannot be copies: under split and pairs they begin as under out_rand. Pure arithmetic; needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import Literal

from megatron_nexus.spec.param import Axis, Constant, Flow, ParamSpec
from megatron_nexus.spec.shard import Box

Init = Literal["out_rand", "in_rand", "split", "pairs", "zero", "noise", "random"]
DIVIDING: tuple[Init, ...] = ("split", "pairs")
"""What divides outgoing weights, with no zero on new paths."""
Part = Literal["whole", "first", "rest"]
"""A part of what is divided: all of it, the share of the first unit, or what is left for the other."""
SPLIT_SHARE = 1.5


class Fill(StrEnum):
    """What fills a box of a grown tensor."""

    KEPT = "kept"  # the old elements, bit for bit
    SCALED = "scaled"  # the old elements, divided with copies of their units
    COPIED = "copied"  # new elements that begin as old ones of another place, or as what they leave
    ZERO = "zero"
    RANDOM = "random"  # drawn as the parameter's initial values
    NOISE = "noise"  # drawn with a share of the deviation of the old elements


@dataclass(frozen=True)
class Segment:
    """A run of indices [start, stop) of a grown axis; `old` is the old index of the first, None where new.

    `inner`: new members of old groups. `part`: first and other units of those that divide outgoing weights.
    """

    start: int
    stop: int
    old: int | None
    inner: bool = False
    part: Part = "whole"


@dataclass(frozen=True)
class FilledBox:
    """A box of a grown tensor, what fills it, and where its values are in the old tensor, if they are."""

    box: Box
    fill: Fill
    old: Box | None = None
    part: Part = "whole"
    """Which part of the outgoing weights it holds; of drawn ones the rest is the first, negated."""
    share: float = 1.0
    """Share of the first part."""
    gradient: float = 1.0
    """The gradient of its elements, as a multiple of that of the elements they come from."""
    drawn: Box | None = None
    """The box that is drawn in its place, where that is another."""

    @property
    def is_new(self) -> bool:
        """Whether its elements are not those of the old model."""
        return self.fill not in (Fill.KEPT, Fill.SCALED)


def segments(old: Axis, new: Axis) -> Iterator[Segment]:
    """Yield the runs of old and new indices of an axis that has grown from `old` to `new`, in order."""
    assert (old.name, old.residual) == (new.name, new.residual), f"{old} did not grow to {new}"
    groups = old.size // old.group
    assert old.group <= new.group and groups <= new.size // new.group, f"{old} is larger than {new}"
    if old.group == new.group:
        yield Segment(0, old.size, 0)
    else:
        for i in range(groups):
            first, grown = i * new.group, i * new.group + old.group
            yield Segment(first, grown, i * old.group)
            yield Segment(grown, first + new.group, None, inner=True)
    if groups * new.group < new.size:
        yield Segment(groups * new.group, new.size, None)


def _divided(old: Axis, new: Axis, init: Init) -> Iterator[Segment]:
    """Yield the runs of an axis whose new units are copies of old ones, or pairs."""
    groups = old.size // old.group
    added = new.size // new.group - groups
    if init == "pairs":
        *kept, last = segments(old, new)
        if not added:
            yield from (*kept, last)
            return
        middle = (last.start + last.stop) // 2
        assert added % 2 == 0, f"{old} to {new} are no pairs"
        yield from kept
        yield replace(last, stop=middle, part="first")
        yield replace(last, start=middle, part="rest")
        return
    assert added <= groups, f"{old} to {new} is more than a copy of each unit"
    runs: list[tuple[int, int, int, Part]] = [
        (0, added, 0, "first"),
        (added, groups - added, added, "whole"),
        (groups, added, 0, "rest"),
    ]
    for first, count, source, part in runs:
        if old.group == new.group and count:
            size = new.group
            yield Segment(first * size, (first + count) * size, source * size, part=part)
            continue
        for i in range(count):
            start = (first + i) * new.group
            yield Segment(start, start + old.group, (source + i) * old.group, part=part)
            yield Segment(start + old.group, start + new.group, None, inner=True)


def _runs(old: Axis, new: Axis, flow: Flow, init: Init) -> Iterator[Segment]:
    """Yield the runs of an axis as `init` divides them."""
    # New units of the residual stream cannot be pairs: the norms that read it see them at once.
    if init in DIVIDING and flow is not Flow.BOUNDARY and not (init == "pairs" and new.residual):
        return _divided(old, new, init)
    return segments(old, new)


def _closes(axis: Axis, flow: Flow, segment: Segment, init: Init) -> bool:
    """Whether a parameter holds the zero of the paths through these new units of one of its axes."""
    match flow:
        case Flow.WRITES:
            return axis.residual or init == "out_rand" or (init in DIVIDING and segment.inner)
        case Flow.READS:
            return not axis.residual and init == "in_rand"
        case Flow.SCORES:
            # Products of new channels would be added to the scores of an old head.
            return segment.inner
        case Flow.GATES | Flow.BOUNDARY:
            return False


def _fill(spec: ParamSpec, parts: tuple[Segment, ...], init: Init) -> Fill:
    new = [i for i, part in enumerate(parts) if part.old is None]
    if not new:
        return Fill.KEPT
    if isinstance(spec.init, Constant) or any(spec.growth_roles[i] is Flow.BOUNDARY for i in new):
        return Fill.RANDOM
    if init == "zero":
        return Fill.ZERO
    if init == "noise":
        return Fill.NOISE
    if init == "random":
        return Fill.RANDOM
    closed = all(_closes(spec.axes[i], spec.growth_roles[i], parts[i], init) for i in new)
    return Fill.ZERO if closed else Fill.RANDOM


def _copied(spec: ParamSpec, parts: tuple[Segment, ...], box: Box, share: float) -> FilledBox:
    """Return a box of which every unit is an old one or a copy."""
    old = Box(tuple(part.old or 0 for part in parts), box.sizes)
    divided: Part = "whole"
    gradient = 1.0
    for part, flow in zip(parts, spec.growth_roles, strict=True):
        if flow is Flow.READS:
            divided = part.part if part.part != "whole" else divided
        else:
            gradient *= {"whole": 1.0, "first": share, "rest": 1.0 - share}[part.part]
    is_copy = any(part.part == "rest" for part in parts)
    fill = Fill.COPIED if is_copy else Fill.SCALED if divided == "first" else Fill.KEPT
    return FilledBox(box, fill, old, divided, share, gradient)


def _paired(spec: ParamSpec, parts: tuple[Segment, ...], filled: FilledBox) -> FilledBox:
    """Return a drawn box as the second unit of its pairs has it: as the first, what it sends changes sign."""
    rests = [part.part == "rest" for part in parts]
    if filled.fill is not Fill.RANDOM or not any(rests):
        return filled
    sizes = filled.box.sizes
    moved = tuple(part.start - size * rest for part, size, rest in zip(parts, sizes, rests, strict=True))
    reads = any(rest for rest, flow in zip(rests, spec.growth_roles, strict=True) if flow is Flow.READS)
    return replace(filled, drawn=Box(moved, sizes), part="rest" if reads else "whole")


def grown_boxes(
    old: ParamSpec, new: ParamSpec, init: Init, split_share: float = SPLIT_SHARE
) -> list[FilledBox]:
    """Return the boxes that make up the tensor `new`, which was `old`.

    `split_share`: of the outgoing weights of an old unit, next to a copy of it.
    """
    axes = zip(old.axes, new.axes, new.growth_roles, strict=True)
    rows = [_runs(before, after, flow, init) for before, after, flow in axes]
    boxes = []
    for parts in product(*rows):
        sizes = tuple(part.stop - part.start for part in parts)
        box = Box(tuple(part.start for part in parts), sizes)
        if not box.numel:
            continue
        if all(part.old is not None for part in parts):
            boxes.append(_copied(new, parts, box, split_share))
        else:
            boxes.append(_paired(new, parts, FilledBox(box, _fill(new, parts, init))))
    return boxes


def _whole(spec: ParamSpec) -> Box:
    return Box((0,) * len(spec.shape), spec.shape)


def _writes_residual(spec: ParamSpec) -> bool:
    return any(
        axis.residual and flow is Flow.WRITES for axis, flow in zip(spec.axes, spec.growth_roles, strict=True)
    )


def copied_boxes(
    source: ParamSpec, new: ParamSpec, init: Init, split_share: float, keeps_function: bool
) -> list[FilledBox]:
    """Return the boxes of a tensor of a new layer that begins as a copy of an old layer's `source`.

    With `keeps_function` it is zero where it writes to the residual stream. That is the one zero of every
    path through the layer, so new units of it, where widths grow too, need no other. Without it the copy is
    whole, and its new units are those of `init`, as in the layer that it is a copy of.
    """
    if keeps_function and _writes_residual(new) and not isinstance(new.init, Constant):
        return [FilledBox(_whole(new), Fill.ZERO)]
    closed_elsewhere = keeps_function and init in ("out_rand", "in_rand", "pairs")
    boxes = grown_boxes(source, new, "random" if closed_elsewhere else init, split_share)
    if keeps_function and init == "split":  # new channels of heads, which are no copies
        boxes = [replace(part, fill=Fill.RANDOM) if part.fill is Fill.ZERO else part for part in boxes]
    return [part if part.is_new else replace(part, fill=Fill.COPIED) for part in boxes]


def inserted_boxes(new: ParamSpec, init: Init) -> list[FilledBox]:
    """Return the one box of a tensor of a new layer: zero where it writes to the residual stream."""
    whole, writes = _whole(new), _writes_residual(new)
    if isinstance(new.init, Constant):
        fill = Fill.RANDOM
    elif init == "zero":
        fill = Fill.ZERO
    elif writes and init != "random":
        fill = Fill.NOISE if init == "noise" else Fill.ZERO
    else:
        fill = Fill.RANDOM
    return [FilledBox(whole, fill)]
