"""Chunks: the boxes of logical tensors that a flat range of a rank's tensor consists of.

ZeRO cuts row-major local tensors into flat ranges. Such a range is a few boxes: part of a first row, whole
rows, part of a last row; at most 2 (n - 1) + 1 of them in n dimensions. Each box is cropped to the
logical tensor, so that padding is never kept, and moved to global offsets. Pure arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box, Shard

CHUNK_ELEMENTS = 1 << 24
"""Largest chunk, in elements (64 MiB of float32): the host memory that saving and loading need."""


@dataclass(frozen=True)
class FragmentBox:
    """A run of a flat fragment that holds one box of the logical tensor.

    `start` counts elements from the fragment's first; the run has the shape `stored` and `box` lies at
    its origin: what else is in the run is padding.
    """

    start: int
    stored: tuple[int, ...]
    box: Box


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the contiguous boxes that make up the elements [start, stop) of a row-major tensor."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # all within one row
        yield from _within_row(shape, start // row, start % row, start % row + stop - start)
        return
    if start % row:
        yield from _within_row(shape, start // row, start % row, row)
    if first_whole < last_whole:
        origin = (0,) * (len(shape) - 1)
        yield Box((first_whole, *origin), (last_whole - first_whole, *shape[1:]))
    if stop % row:
        yield from _within_row(shape, last_whole, 0, stop % row)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for inner in flat_boxes(shape[1:], start, stop):
        yield Box((row, *inner.offsets), (1, *inner.sizes))


def split_box(box: Box, most: int) -> Iterator[Box]:
    """Split `box` into boxes of at most `most` elements, along its first axis that is longer than one.

    Parts of a contiguous box are contiguous: all axes before that one have the length one.
    """
    if box.numel <= most:
        yield box
        return
    axis = next(i for i, size in enumerate(box.sizes) if size > 1)
    size = box.sizes[axis]
    step = max(1, most * size // box.numel)
    for first in range(0, size, step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[axis] += first
        sizes[axis] = min(step, size - first)
        yield from split_box(Box(tuple(offsets), tuple(sizes)), most)


def fragment_boxes(
    spec: ParamSpec, shard: Shard, start: int, count: int, most: int = CHUNK_ELEMENTS
) -> Iterator[FragmentBox]:
    """Yield the boxes of the `count` elements from `start` of this rank's tensor, without padding."""
    shape, logical = shard.local_shape(spec), shard.box(spec)
    assert start >= 0 and start + count <= prod(shape), f"{spec.name}: {start} + {count} is outside {shape}"
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for run in flat_boxes(shape, start, start + count):
        for part in split_box(run, most):
            sizes = tuple(
                max(0, min(offset + size, held) - offset)
                for offset, size, held in zip(part.offsets, part.sizes, logical.sizes, strict=True)
            )
            if 0 in sizes:
                continue
            offsets = tuple(a + b for a, b in zip(logical.offsets, part.offsets, strict=True))
            position = sum(offset * stride for offset, stride in zip(part.offsets, strides, strict=True))
            yield FragmentBox(position - start, part.sizes, Box(offsets, sizes))


def full_box(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole logical tensor."""
    return Box((0,) * len(shape), shape)


def intersect(one: Box, other: Box) -> Box | None:
    """Return the intersection of two boxes, or None if it is empty."""
    starts = [max(a, b) for a, b in zip(one.offsets, other.offsets, strict=True)]
    stops = [
        min(a + m, b + n)
        for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    ]
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(tuple(starts), sizes) if min(sizes) > 0 else None


def index_within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return the index of `box` in an array that holds `outer`."""
    return tuple(
        slice(offset - origin, offset - origin + size)
        for offset, size, origin in zip(box.offsets, box.sizes, outer.offsets, strict=True)
    )


class BoxIndex:
    """Where boxes of one tensor begin and end: asked at once which of them a box meets.

    A tensor is stored in up to three boxes for each rank, and each rank asks for its own.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._starts = np.array([box.offsets for box in boxes])
        self._stops = self._starts + np.array([box.sizes for box in boxes])

    def overlapping(self, box: Box) -> list[int]:
        """Return the indices of the boxes that share an element with `box`, ascending."""
        start = np.array(box.offsets)
        shared = np.minimum(self._stops, start + box.sizes) > np.maximum(self._starts, start)
        return np.flatnonzero(shared.all(axis=1)).tolist()


def are_disjoint(boxes: Sequence[Box]) -> bool:
    """Return whether no element lies in two of the boxes."""
    if len(boxes) < 2:
        return True
    index = BoxIndex(boxes)
    return all(len(index.overlapping(box)) == 1 for box in boxes)
