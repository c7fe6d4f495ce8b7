"""Shards cut logical tensors into disjoint parts that cover them, whatever the sizes."""

import pytest

from megatron_nexus.spec.param import Axis, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box, Shard

SIZES = [1, 2, 3, 5, 8, 13, 64, 97, 780, 1530, 1706]
GRID = [
    (size, ranks, multiple) for size in SIZES for ranks in (1, 2, 3, 4, 6, 8) for multiple in (1, 2, 8, 64)
]


def spec_of(*axes: Axis) -> ParamSpec:
    return ParamSpec("weight", axes, Normal(0.02), Role.MATMUL)


def test_split_parts_cover_a_logical_axis_exactly_once() -> None:
    only_padding = 0
    for size, ranks, multiple in GRID:
        axis = Axis("nexus_m", size, Layout.SHARDED_PADDED)
        ranges = [Shard(rank, ranks, multiple).logical_range(axis) for rank in range(ranks)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
        only_padding += sum(start == stop for start, stop in ranges)
    assert only_padding > 20, "ranks that hold padding only were never tried"


def test_split_parts_are_equal_aligned_and_no_larger_than_needed() -> None:
    for size, ranks, multiple in GRID:
        axis = Axis("nexus_m", size, Layout.SHARDED_PADDED)
        parts = {Shard(rank, ranks, multiple).stored(axis) for rank in range(ranks)}
        assert len(parts) == 1
        part = parts.pop()
        assert part % multiple == 0
        assert (part - multiple) * ranks < size <= part * ranks


def test_every_rank_gathers_what_all_ranks_split() -> None:
    for size, ranks, multiple in GRID:
        for rank in range(ranks):
            shard = Shard(rank, ranks, multiple)
            split, gathered = Axis("m", size, Layout.SHARDED_PADDED), Axis("m", size, Layout.GATHERED)
            assert shard.stored(gathered) == ranks * shard.stored(split)
            assert shard.logical_range(gathered) == (0, size)


@pytest.mark.parametrize("multiple", [1, 64])
def test_exact_axes_are_never_padded(multiple: int) -> None:
    axis = Axis("heads", 12, Layout.SHARDED)
    shards = [Shard(rank, 4, multiple) for rank in range(4)]
    assert [shard.stored(axis) for shard in shards] == [3] * 4
    assert [shard.logical_range(axis) for shard in shards] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(AssertionError, match="does not divide by 5"):
        Shard(0, 5).stored(axis)


def test_whole_axes_are_the_same_on_every_rank() -> None:
    axis = Axis("hidden", 13)
    assert {(Shard(r, 4, 8).stored(axis), Shard(r, 4, 8).logical_range(axis)) for r in range(4)} == {
        (13, (0, 13))
    }


def test_boxes_of_all_ranks_cover_a_tensor_exactly_once() -> None:
    spec = spec_of(Axis("a", 13, Layout.SHARDED_PADDED), Axis("m", 10, Layout.GATHERED))
    seen: set[tuple[int, int]] = set()
    for rank in range(4):
        shard = Shard(rank, 4, 2)
        box = shard.box(spec)
        cells = {
            (row, column)
            for row in range(box.offsets[0], box.offsets[0] + box.sizes[0])
            for column in range(box.offsets[1], box.offsets[1] + box.sizes[1])
        }
        assert len(cells) == box.numel
        assert not cells & seen
        assert all(size <= stored for size, stored in zip(box.sizes, shard.local_shape(spec), strict=True))
        seen |= cells
    assert len(seen) == spec.numel == 130


def test_one_rank_without_padding_holds_the_logical_tensor() -> None:
    spec = spec_of(Axis("a", 7, Layout.SHARDED_PADDED), Axis("m", 5, Layout.GATHERED), Axis("d", 3))
    assert Shard(0, 1).local_shape(spec) == spec.shape == (7, 5, 3)
    assert Shard(0, 1).box(spec) == Box((0, 0, 0), (7, 5, 3))


@pytest.mark.parametrize(
    ("layout", "sharded"),
    [
        (Layout.REPLICATED, False),
        (Layout.GATHERED, False),
        (Layout.SHARDED_PADDED, True),
        (Layout.SHARDED, True),
    ],
)
def test_a_parameter_is_sharded_where_ranks_hold_different_parts(layout: Layout, sharded: bool) -> None:
    spec = spec_of(Axis("hidden", 4), Axis("x", 8, layout))
    assert spec.is_sharded is sharded
    boxes = {Shard(rank, 2).box(spec) for rank in range(2)}
    assert len(boxes) == (2 if sharded else 1)
