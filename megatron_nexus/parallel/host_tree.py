"""Host tree: barriers and short messages between all ranks on the host, over small gloo groups.

    node         0 1 2 3   4 5 6 7   8 9 10 11      LOCAL_WORLD_SIZE consecutive ranks
    leaders      0         4         8              the first rank of each, up to FANOUT in a group
                 0                                  ... and the leaders of those

gloo connects each member of a group with others: with one group of N ranks a collective takes up to 2 (N - 1)
hops, here about 2 FANOUT log(N). Each rank is in one group, the first ranks of nodes in a few. A message goes
up to rank 0 and what rank 0 makes of it comes down. Where a rank has nothing to say nothing is sent for it.
"""

import json
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, ReduceOp, Store, Work

FANOUT = 32
"""Members of a group at most."""


class _Group(Protocol):
    """What torch's stub leaves out of a ProcessGroupGloo."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def reduce(self, x: Tensor, root: int, op: ReduceOp.RedOpType, /) -> Work: ...
    def broadcast(self, x: Tensor, root: int, /) -> Work: ...
    def allgather(self, outputs: list[Tensor], x: Tensor, /) -> Work: ...
    def gather(self, outputs: list[Tensor], x: Tensor, root: int, /) -> Work: ...


class HostTree:
    """All ranks, on the host, whatever the device; every method is a collective call of all ranks.

    The checkpoint and the loop use it, never the model. It has the methods of `base.communicator.Ranks`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        timeout: timedelta,
        node_size: int = 1,
        fanout: int = FANOUT,
    ) -> None:
        """Make the groups of this rank. Ranks `node_size` k ... `node_size` (k + 1) - 1 are on one machine.

        That decides only the speed: every rank may give another `node_size`, and that of rank 0 counts.
        `store` is what all ranks share, `timeout` how long a rank waits for others, `fanout` how many ranks
        are in one group at most.
        """
        self.rank = rank
        self.size = size
        self._store = store
        self._calls = 0
        if rank == 0:
            store.set("host_tree/node_size", str(node_size))
        self.node_size = int(store.get("host_tree/node_size"))
        """How many consecutive ranks are on one machine, as rank 0 says."""
        # From the node upwards. dist.new_group would name them by how many groups this rank has made before.
        self._groups: list[_Group] = []
        for level, members in enumerate(levels(rank, size, self.node_size, fanout)):
            own_store = PrefixStore(f"host_tree/{level}/{members[0]}", store)
            group = ProcessGroupGloo(own_store, members.index(rank), len(members), timeout)
            self._groups.append(cast(_Group, group))

    def barrier(self) -> None:
        """Return once every rank has called this."""
        self.all_reduce(torch.zeros(1))

    def all_reduce(self, x: Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> None:
        """Put the sum over all ranks, or what `op` says, of tensors on the host into each of them."""
        for group in self._groups:
            group.reduce(x, 0, op).wait()
        self.broadcast(x)

    def any(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is set on any."""
        found = torch.tensor([flag], dtype=torch.uint8)
        self.all_reduce(found, ReduceOp.MAX)
        return bool(found.item())

    def broadcast(self, x: Tensor) -> None:
        """Put the tensor of rank 0 into those of all ranks, which are on the host and of its shape."""
        for group in reversed(self._groups):
            group.broadcast(x, 0).wait()

    def all_gather_str(self, message: str) -> list[str]:
        """Return the short message of every rank on every rank; only those that are not empty travel."""
        return self._listed(self.broadcast_str(self._up(self._own(message))))

    def gather_str(self, message: str) -> list[str]:
        """Return the message of every rank on rank 0, and an empty list elsewhere."""
        found = self._up(self._own(message))
        return self._listed(found) if self.rank == 0 else []

    def broadcast_str(self, message: str) -> str:
        """Return the message of rank 0 on every rank."""
        for group in reversed(self._groups):
            message = _spread(message, group)
        return message

    def distinct_str(self, message: str) -> dict[str, int]:
        """Return the different messages of the ranks, each with a rank that has it, on every rank."""
        return json.loads(self.broadcast_str(self._up(json.dumps({message: self.rank}))))

    def gather_str_on_host(self, message: str) -> list[str]:
        """Return the messages of the ranks on this rank's machine, in the order of ranks."""
        self._calls += 1
        key = f"host_tree/{self._calls}/{socket.gethostname()}"
        self._store.append(key, json.dumps([self.rank, message]) + "\n")  # type: ignore[attr-defined]
        self.barrier()
        lines = sorted(json.loads(line) for line in self._store.get(key).decode().splitlines())
        return [text for _, text in lines]

    def all_gather_str_on_node(self, message: str) -> list[str]:
        """Return the messages of this rank's node, of `fanout` of its ranks at most, in the order of ranks.

        Nothing leaves the node, and rank 0's store takes no part.
        """
        if self.node_size == 1 or not self._groups:
            return [message]
        return json.loads(_spread(json.dumps(_gather(message, self._groups[0])), self._groups[0]))

    def _own(self, message: str) -> str:
        return json.dumps({str(self.rank): message}) if message else ""

    def _listed(self, joined: str) -> list[str]:
        """Return the messages of all ranks in order."""
        found = [""] * self.size
        for rank, text in json.loads(joined or "{}").items():
            found[int(rank)] = text
        return found

    def _up(self, contents: str) -> str:
        """Return on rank 0 the JSON objects of all ranks as one; elsewhere what has come so far."""
        for group in self._groups:
            joined: dict[str, str | int] = {}
            for part in filter(None, _gather(contents, group)):
                for key, value in json.loads(part).items():
                    joined.setdefault(key, value)
            contents = json.dumps(joined) if joined else ""
        return contents


def levels(rank: int, size: int, node_size: int, fanout: int = FANOUT) -> list[Sequence[int]]:
    """Return the groups of `rank` from its node upwards, each as its ranks; the first of them leads it."""
    found: list[Sequence[int]] = []
    stride, width = 1, min(fanout, node_size)
    while stride < size and rank % stride == 0:
        if width > 1:
            first = rank - rank % (stride * width)
            found.append(range(first, min(first + stride * width, size), stride))
        stride, width = stride * width, fanout
    return found


def _gather(contents: str, group: _Group) -> list[str]:
    """Return the contents of a group's ranks on its first, elsewhere this rank's own."""
    mine = _bytes_of(contents)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather(lengths, torch.tensor([mine.numel()])).wait()
    longest = max(int(length) for length in lengths)
    if longest == 0 or group.size() == 1:
        return [contents] * group.size()
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: mine.numel()] = mine
    gathered = [torch.empty_like(padded) for _ in lengths] if group.rank() == 0 else []
    group.gather(gathered, padded, 0).wait()
    if not gathered:
        return [contents]
    return [_text_of(part[: int(length)]) for part, length in zip(gathered, lengths, strict=True)]


def _spread(contents: str, group: _Group) -> str:
    """Return the contents of a group's first rank on all of its ranks."""
    x = _bytes_of(contents)
    length = torch.tensor([x.numel()])
    group.broadcast(length, 0).wait()
    if group.rank() > 0:
        x = torch.empty(int(length), dtype=torch.uint8)
    if x.numel():
        group.broadcast(x, 0).wait()
    return _text_of(x)


def _bytes_of(message: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(message.encode(), np.uint8).copy())


def _text_of(contents: Tensor) -> str:
    return contents.numpy().tobytes().decode()
