"""One of eight ranks that compares host trees with one flat gloo group; those of worlds of one to eight."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.devices import require_own_device
from megatron_nexus.parallel.host_tree import HostTree
from tests.support.waiting import TIMEOUT_S

TIMEOUT = timedelta(seconds=TIMEOUT_S)
SIZES = (1, 2, 3, 5, 8)
SHAPES = ((1, 2), (2, 3), (3, 8))
"""Ranks of a machine, and of a group at most."""


def messages(size: int) -> list[list[str]]:
    """What the ranks say in turn: all, some, one or none of them, short and long, the same and others."""
    return [
        [f"rank {rank}" for rank in range(size)],
        ["é" * rank for rank in range(size)],
        ["" if rank < size - 1 else '"{last}"' for rank in range(size)],
        ["x" * 10_000] * size,
        [""] * size,
    ]


def compare(rank: int, size: int, tree: HostTree, node: slice) -> None:
    for said in messages(size):
        flat: list[object] = [None] * size
        dist.all_gather_object(flat, said[rank])
        assert tree.all_gather_str(said[rank]) == flat
        assert tree.gather_str(said[rank]) == (flat if rank == 0 else [])
        assert tree.gather_str_on_host(said[rank]) == flat, socket.gethostname()
        assert tree.all_gather_str_on_node(said[rank]) == flat[node]
        assert tree.broadcast_str(said[rank]) == flat[0]
        distinct = tree.distinct_str(said[rank])
        assert {text: said[one] for text, one in distinct.items()} == {text: text for text in flat}
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        mine = torch.arange(4, dtype=torch.float64).roll(rank) * 3**rank
        expected = mine.clone()
        dist.all_reduce(expected, op)
        tree.all_reduce(mine, op)
        assert torch.equal(mine, expected), "whole numbers: exact in every order"
    for asked in (-1, size - 1):
        assert tree.any(rank == asked) is (asked >= 0)
    from_first = torch.full((2, 3), rank)
    tree.broadcast(from_first)
    assert not from_first.any()
    tree.barrier()


def check_devices(rank: int, size: int, tree: HostTree) -> None:
    """Ranks with devices of their own pass; where the last two share one, or kinds differ, all raise."""
    require_own_device(tree, "here", "cuda", f"GPU-{rank}")
    for kind, uuid, message in (
        ("cuda", f"GPU-{min(rank, size - 2)}", f"ranks {size - 2}, {size - 1} on here share one device"),
        ("cpu" if rank == size - 1 else "cuda", f"GPU-{rank}", f"rank {size - 1} has cpu"),
    ):
        try:
            require_own_device(tree, "here", kind, uuid)
        except ConfigError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def main() -> None:
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    for size in (size for size in SIZES if rank < size <= int(os.environ["WORLD_SIZE"])):
        store = dist.TCPStore("127.0.0.1", port + size, size, rank == 0, TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        for index, (node_size, fanout) in enumerate(SHAPES):
            # Only what rank 0 says of its machine counts.
            said = node_size if rank == 0 else rank
            tree = HostTree(rank, size, dist.PrefixStore(str(index), store), TIMEOUT, said, fanout)
            first = rank - rank % min(node_size, fanout)
            compare(rank, size, tree, slice(first, first + min(node_size, fanout)))
            if size == 3:
                check_devices(rank, size, tree)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
