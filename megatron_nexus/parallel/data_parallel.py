"""The reduction of gradients over d data-parallel ranks, each of which keeps one of d equal partitions.

Over one group of all d, or over two in turn where L neighbouring ranks share a node: first the L of a node,
then the d / L that hold the same parts on other nodes. Between nodes each rank then sends (d / L - 1) n
elements in place of up to (d - L) n, and a ring has L + d / L - 2 hops in place of d - 1.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.parallel.tensor_parallel import reduce_scatter_into


class MeanReduction:
    """A reduce-scatter under way, of `flat` [d * n]: each rank gets the mean of its own n elements.

    Ranks begin and advance their reductions in the same order. Each rank sends (d - 1) n elements, or over
    two groups of L and d / L ranks (d - d / L) n and then (d / L - 1) n.
    """

    def __init__(self, flat: Tensor, partition: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
        """Begin. `partition` [n] is written at the end, and may be a view of this rank's part of `flat`.

        What `flat` holds of the other parts afterwards is undefined. The ranks of the first of two `groups`
        have neighbouring parts.
        """
        self._partition = partition
        self._ranks = prod(group.size() for group in groups)
        first, *self._later = groups
        self._sum = partition
        if self._later:
            # The parts that one rank of the node holds for it, and for those in its place on other nodes.
            flat = flat.view(-1, first.size(), partition.numel()).transpose(0, 1).reshape(-1)
            self._sum = partition.new_empty(flat.numel() // first.size())
        self._wait = _begin_sum(flat, self._sum, first)

    def advance(self) -> None:
        """Begin the second of two stages, if that has not begun."""
        if self._later:
            self._wait()
            self._wait = _begin_sum(self._sum, self._partition, self._later.pop())

    def finish(self) -> None:
        """Wait, and write the mean."""
        self.advance()
        self._wait()
        self._partition.mul_(1.0 / self._ranks)


def _begin_sum(flat: Tensor, own: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """Begin to put the sum over a group of this rank's part of `flat` into `own`; return the wait for it."""
    if flat.device.type != "cpu":
        return reduce_scatter_into(own, flat, group=group, async_op=True).wait
    # gloo's reduce-scatter is an all-reduce of a copy: twice the bytes, and slower than an all-to-all whose
    # parts are added here, in the order of ranks whatever the size.
    received = torch.empty_like(flat)
    exchange = dist.all_to_all_single(received, flat, group=group, async_op=True)

    def add() -> None:
        exchange.wait()
        first, *others = received.view(group.size(), -1)
        own.copy_(first)
        for other in others:
            own.add_(other)

    return add
