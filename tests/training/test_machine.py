"""Cores are shared among the ranks that may use them, whether or not the launcher has bound them."""

import pytest

from megatron_nexus.training.machine import core_share

ALL = [str(core) for core in range(8)]


@pytest.mark.parametrize(
    ("places", "threads"),
    [
        ([("a", ALL)], [8]),
        ([("a", ALL), ("a", ALL)], [4, 4]),  # nobody is bound
        ([("a", ALL[:4]), ("a", ALL[4:])], [4, 4]),  # srun --cpus-per-task=4, mpirun --bind-to socket
        ([("a", ALL[:2]), ("a", ALL[2:])], [2, 6]),
        ([("a", ALL), ("b", ALL)], [8, 8]),  # the same numbers on two hosts are other cores
        ([("a", ALL[:4])] * 2 + [("a", ALL[4:])] * 2, [2, 2, 2, 2]),  # two ranks a socket
        ([("a", ALL[:2])] * 3, [1, 1, 1]),  # more ranks than cores
        ([("a", ALL)] * 3, [2, 2, 2]),
    ],
)
def test_a_rank_gets_its_share_of_its_own_cores(
    places: list[tuple[str, list[str]]], threads: list[int]
) -> None:
    assert [core_share(rank, places) for rank in range(len(places))] == threads
