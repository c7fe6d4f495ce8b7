"""The host tree says what one group of all ranks says, and no rank is connected with many."""

import pytest

from megatron_nexus.parallel.host_tree import levels
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks


@pytest.mark.law
@pytest.mark.torch_versions
def test_a_tree_of_any_shape_is_one_flat_group() -> None:
    """Every collective on one to eight ranks, machines of one to three and groups of two to eight."""
    run_ranks(8, TESTS / "parallel" / "host_tree_worker.py")


@pytest.mark.parametrize(
    ("size", "node_size"), [(1, 1), (7, 3), (64, 8), (100, 64), (16_384, 8), (16_384, 1)]
)
def test_groups_reach_all_ranks_and_each_rank_is_in_few(size: int, node_size: int) -> None:
    groups = [levels(rank, size, node_size) for rank in range(size)]
    peers = [sum(len(group) - 1 for group in mine) for mine in groups]
    assert max(peers) <= 101
    for rank, mine in enumerate(groups):
        assert all(rank in group for group in mine)
        # Members of a group are in the same one, at the same level.
        for depth, group in enumerate(mine):
            assert len(group) <= 32
            assert all(groups[other][depth] == group for other in group)
        # Each rank but the first has a leader above it, of a lower number.
        assert rank == 0 or mine[-1][0] < rank
