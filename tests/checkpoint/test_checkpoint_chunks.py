"""Laws of chunks: the boxes of flat ranges cover them once, and no padding is among them."""

import itertools

import numpy as np
import pytest

from megatron_nexus.checkpoint.chunks import (
    BoxIndex,
    are_disjoint,
    flat_boxes,
    fragment_boxes,
    index_within,
    intersect,
    split_box,
)
from megatron_nexus.spec.param import Axis, Constant, Layout, ParamSpec, Role
from megatron_nexus.spec.shard import Box, Shard

SHAPES = [(11,), (3, 5), (1, 7), (7, 1), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_flat_range_is_few_contiguous_boxes(shape: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        boxes = list(flat_boxes(shape, start, stop))
        assert len(boxes) <= 2 * (len(shape) - 1) + 1
        origin = Box((0,) * len(shape), shape)
        walked = [n for box in boxes for n in numbers[index_within(box, origin)].reshape(-1).tolist()]
        # In order, hence every box is one contiguous run.
        assert walked == list(range(start, stop))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 2, 5])
def test_split_boxes_stay_contiguous_and_small(shape: tuple[int, ...], most: int) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    origin = Box((0,) * len(shape), shape)
    for box in flat_boxes(shape, 1, numbers.size):
        parts = list(split_box(box, most))
        assert all(part.numel <= most for part in parts)
        walked = [n for part in parts for n in numbers[index_within(part, origin)].reshape(-1).tolist()]
        assert walked == numbers[index_within(box, origin)].reshape(-1).tolist()


SHARDED = (Layout.SHARDED_PADDED, Layout.SHARDED)
# At most one axis of a parameter is divided among ranks.
LAYOUTS = [(a, b) for a in Layout for b in Layout if not (a in SHARDED and b in SHARDED)]


def test_fragments_of_all_ranks_are_the_logical_tensor() -> None:
    for layouts, tensor_size, cuts in itertools.product(LAYOUTS, (1, 2, 3), (1, 2, 5)):
        sizes = tuple(6 if layout is Layout.SHARDED else 7 for layout in layouts)
        axes = tuple(Axis("abc"[i], sizes[i], layouts[i]) for i in range(2))
        spec = ParamSpec("w", axes, Constant(0.0), Role.MATMUL)
        logical = np.arange(1.0, spec.numel + 1).reshape(spec.shape)
        found = np.zeros(spec.shape)
        for rank in range(tensor_size if spec.is_sharded else 1):
            shard = Shard(rank, tensor_size, multiple=2)
            box = shard.box(spec)
            local = np.zeros(shard.local_shape(spec))
            local[tuple(slice(0, size) for size in box.sizes)] = logical[
                index_within(box, Box((0, 0), spec.shape))
            ]
            edges = [local.size * cut // cuts for cut in range(cuts + 1)]
            for start, stop in itertools.pairwise(edges):
                flat = local.reshape(-1)[start:stop]
                for part in fragment_boxes(spec, shard, start, stop - start, most=4):
                    run = flat[part.start : part.start + np.prod(part.stored)].reshape(part.stored)
                    found[index_within(part.box, Box((0, 0), spec.shape))] += run[part.box.index_at_origin]
        assert (found == logical).all(), (layouts, tensor_size, cuts)


def test_intersection_and_disjointness() -> None:
    one, other = Box((0, 2), (3, 4)), Box((2, 0), (3, 4))
    assert intersect(one, other) == Box((2, 2), (1, 2))
    assert intersect(one, Box((3, 2), (1, 1))) is None
    assert not are_disjoint([one, Box((8, 8), (1, 1)), other])
    assert are_disjoint([one, Box((3, 0), (2, 9)), Box((0, 0), (3, 2))])


def test_extents_meet_what_intersects() -> None:
    rng = np.random.default_rng(5)
    for shape in SHAPES:
        boxes = []
        for _ in range(30):
            starts = [int(rng.integers(0, size)) for size in shape]
            sizes = [
                int(rng.integers(1, size - start + 1)) for start, size in zip(starts, shape, strict=True)
            ]
            boxes.append(Box(tuple(starts), tuple(sizes)))
        index = BoxIndex(boxes)
        for box in boxes:
            expected = [n for n, other in enumerate(boxes) if intersect(other, box) is not None]
            assert index.overlapping(box) == expected
