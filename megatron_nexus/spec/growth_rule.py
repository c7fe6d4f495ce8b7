"""Growth of a parameter: which elements of a larger tensor are old, and what fills the new ones.

New units are appended at the end of an axis, new members at the end of each group. For a path old -> new ->
old to carry gradients without changing the function it must hold exactly one zero factor: two zeros
never train, none changes the function. So each axis is closed on one side of its new units:

    out_rand   zero where they are written, random where they are read
    in_rand    random where they are written, zero where they are read
    zero       zero everywhere: no gradient ever reaches them, because gelu(0) = 0 and silu(0) = 0

Or on neither side, and the function changes: `noise` draws a share of the old deviation, `random` the initial
values, as the released code of Tokenformer does.

The residual stream is read through norms and so is closed where it is written, whatever the choice.
A box that is new along several axes is zero only where all of them are closed by this parameter: an
axis that it leaves open has its zero elsewhere on the same path. Pure arithmetic; needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import Literal

from megatron_nexus.spec.param import Axis, Constant, Flow, ParamSpec
from megatron_nexus.spec.shard import Box

Init = Literal["out_rand", "in_rand", "zero", "noise", "random"]


class Fill(StrEnum):
    """What fills a box of a grown tensor."""

    KEPT = "kept"  # the old elements, bit for bit
    COPIED = "copied"  # new elements that begin as old ones of another place
    ZERO = "zero"
    RANDOM = "random"  # drawn as the parameter's initial values
    NOISE = "noise"  # drawn with a share of the deviation of the old elements


@dataclass(frozen=True)
class Segment:
    """A run of indices [start, stop) of a grown axis; `old` is the old index of the first, None where new.

    `inner`: new members of old groups.
    """

    start: int
    stop: int
    old: int | None
    inner: bool = False


@dataclass(frozen=True)
class FilledBox:
    """A box of a grown tensor, what fills it, and where its values are in the old tensor, if they are."""

    box: Box
    fill: Fill
    old: Box | None = None

    @property
    def is_new(self) -> bool:
        """Whether its elements are not those of the old model."""
        return self.fill is not Fill.KEPT


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


def _closes(axis: Axis, flow: Flow, segment: Segment, init: Init) -> bool:
    """Whether a parameter holds the zero of the paths through these new units of one of its axes."""
    match flow:
        case Flow.WRITES:
            return axis.residual or init == "out_rand"
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


def grown_boxes(old: ParamSpec, new: ParamSpec, init: Init) -> list[FilledBox]:
    """Return the boxes that make up the tensor `new`, which was `old`."""
    rows = (segments(*axes) for axes in zip(old.axes, new.axes, strict=True))
    boxes = []
    for parts in product(*rows):
        sizes = tuple(part.stop - part.start for part in parts)
        box = Box(tuple(part.start for part in parts), sizes)
        if not box.numel:
            continue
        offsets = tuple(part.old for part in parts if part.old is not None)
        kept = Box(offsets, sizes) if len(offsets) == len(parts) else None
        boxes.append(FilledBox(box, _fill(new, parts, init), kept))
    return boxes


def _whole(spec: ParamSpec) -> Box:
    return Box((0,) * len(spec.shape), spec.shape)


def _writes_residual(spec: ParamSpec) -> bool:
    """Whether a parameter writes to the residual stream."""
    return any(
        axis.residual and flow is Flow.WRITES for axis, flow in zip(spec.axes, spec.growth_roles, strict=True)
    )


def copied_boxes(source: ParamSpec, new: ParamSpec, init: Init, keeps_function: bool) -> list[FilledBox]:
    """Return the boxes of a tensor of a new layer that begins as a copy of an old layer's `source`.

    With `keeps_function` it is zero where it writes to the residual stream. That is the one zero of every
    path through the layer, so new units of it, where widths grow too, need no other. Without it the copy is
    whole, and its new units are those of `init`, as in the layer that it is a copy of.
    """
    if keeps_function and _writes_residual(new) and not isinstance(new.init, Constant):
        return [FilledBox(_whole(new), Fill.ZERO)]
    closed_elsewhere = keeps_function and init in ("out_rand", "in_rand")
    boxes = grown_boxes(source, new, "random" if closed_elsewhere else init)
    return [replace(part, fill=Fill.COPIED) if part.fill is Fill.KEPT else part for part in boxes]


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
