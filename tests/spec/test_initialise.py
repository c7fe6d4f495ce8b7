"""Initial values are a function of (seed, name, element): every topology starts from the same bits."""

import numpy as np
import pytest
import torch

from megatron_nexus.spec.element_draws import BLOCK
from megatron_nexus.spec.initialise import local_values, logical_values
from megatron_nexus.spec.param import Axis, Constant, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box, Shard

STD = 0.02


def matrix(rows: int, columns: int, name: str = "layers.0.attention.q.w_a") -> ParamSpec:
    axes = (Axis("a", rows, Layout.SHARDED_PADDED), Axis("m", columns, Layout.GATHERED))
    return ParamSpec(name, axes, Normal(STD), Role.MATMUL)


def whole(spec: ParamSpec, seed: int = 1) -> np.ndarray:
    return logical_values(spec, seed, Box((0,) * len(spec.shape), spec.shape))


# More elements than a block, and rows that straddle block borders.
LARGE = matrix(701, 413)


@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (2, 1), (3, 1), (4, 8), (7, 64), (8, 128)])
@pytest.mark.parametrize("split_rows", [True, False])
def test_the_ranks_parts_are_the_whole_bit_for_bit_and_padding_is_zero(
    ranks: int, multiple: int, split_rows: bool
) -> None:
    rows, columns = LARGE.axes
    if split_rows:
        spec = LARGE
    else:
        spec = ParamSpec(
            LARGE.name,
            (Axis("d", rows.size), Axis("a", columns.size, Layout.SHARDED_PADDED)),
            LARGE.init,
            LARGE.role,
        )
    expected = torch.from_numpy(whole(LARGE))
    assembled = torch.full(spec.shape, torch.nan)
    for rank in range(ranks):
        shard = Shard(rank, ranks, multiple)
        local, box = local_values(spec, shard, seed=1), shard.box(spec)
        assert local.shape == shard.local_shape(spec)
        assert local.dtype == torch.float32
        inside = tuple(slice(0, size) for size in box.sizes)
        there = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        assembled[there] = local[inside]
        local[inside] = 0.0
        assert not local.any(), "padding is not zero"
    assert torch.equal(assembled, expected)


def test_a_box_is_the_slice_of_the_whole() -> None:
    expected = whole(LARGE)
    rng = np.random.default_rng(0)
    for _ in range(12):
        starts = [int(rng.integers(0, size)) for size in LARGE.shape]
        sizes = [int(rng.integers(1, size - o + 1)) for size, o in zip(LARGE.shape, starts, strict=True)]
        values = logical_values(LARGE, 1, Box(tuple(starts), tuple(sizes)))
        there = tuple(slice(o, o + s) for o, s in zip(starts, sizes, strict=True))
        assert np.array_equal(values, expected[there])


def test_a_vector_longer_than_a_block_is_cut_anywhere() -> None:
    spec = ParamSpec("v", (Axis("x", 2 * BLOCK + 5),), Normal(1.0), Role.VECTOR)
    expected = whole(spec)
    for start, stop in [(0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (2 * BLOCK + 4, 2 * BLOCK + 5)]:
        assert np.array_equal(logical_values(spec, 1, Box((start,), (stop - start,))), expected[start:stop])
    assert len(np.unique(expected)) > 1.9 * BLOCK, "blocks repeat each other"


@pytest.mark.parametrize(
    "other", [whole(matrix(64, 64), seed=2), whole(matrix(64, 64, "layers.1.attention.q.w_a"))]
)
def test_another_seed_or_name_gives_independent_values(other: np.ndarray) -> None:
    ours = whole(matrix(64, 64))
    assert np.array_equal(ours, whole(matrix(64, 64)))
    correlation = np.corrcoef(ours.ravel(), other.ravel())[0, 1]
    # The correlation of n independent pairs is N(0, 1 / n): five standard deviations of 4,096 pairs.
    assert abs(correlation) < 5 / 64


def test_values_are_normal_with_the_asked_deviation() -> None:
    values = whole(LARGE).ravel().astype(np.float64) / STD
    n = values.size
    # Five standard errors each: of the mean 1 / sqrt(n), of the variance sqrt(2 / n), of the fourth
    # moment sqrt(96 / n); the extremes of 290,000 normal values lie beyond 4 but not beyond 6.5.
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert 4 < np.abs(values).max() < 6.5


def test_constants_fill_the_logical_part_only() -> None:
    spec = ParamSpec("gain", (Axis("m", 5, Layout.SHARDED_PADDED),), Constant(1.0), Role.VECTOR)
    assert [local_values(spec, Shard(rank, 3, 2), 1).tolist() for rank in range(3)] == [
        [1.0, 1.0],
        [1.0, 1.0],
        [1.0, 0.0],
    ]


def test_a_rank_of_padding_only_starts_with_zeros() -> None:
    assert local_values(matrix(3, 4), Shard(3, 4, 2), 1).tolist() == [[0.0] * 8] * 2


def test_a_seed_means_the_same_weights_in_every_version() -> None:
    spec = ParamSpec("v", (Axis("x", 2 * BLOCK),), Normal(1.0), Role.VECTOR)
    # Written down once: the first elements of the first two blocks. numpy keeps its streams (NEP 19), save
    # for the method of drawing normal values, of which the last bits might change.
    first, second = whole(spec)[:3], whole(spec)[BLOCK : BLOCK + 2]
    assert first == pytest.approx([-0.31531182, -0.6705116, 0.982872], abs=1e-6)
    assert second == pytest.approx([-0.53302854, 1.0151453], abs=1e-6)
