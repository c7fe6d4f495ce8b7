"""The reduction of gradients over d data-parallel ranks, each of which keeps one of d equal partitions."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.parallel.tensor_parallel import reduce_scatter_into


def begin_reduce_scatter_mean(
    flat: Tensor, partition: Tensor, group: dist.ProcessGroup
) -> Callable[[], None]:
    """Begin to reduce-scatter `flat` [d * n]; the function returned waits and writes the mean.

    It writes this rank's [n] elements to `partition`, which may be a view of them in `flat`; what `flat`
    holds of the others afterwards is undefined. Each rank sends (d - 1) n elements. Ranks begin their
    reductions in the same order.
    """
    if flat.device.type != "cpu":
        work = reduce_scatter_into(partition, flat, group=group, async_op=True)

        def finish() -> None:
            work.wait()
            partition.mul_(1.0 / group.size())

        return finish
    # gloo's reduce-scatter is an all-reduce of a copy: twice the bytes, and slower than an all-to-all whose
    # parts are added here, in the order of ranks whatever the size.
    received = torch.empty_like(flat)
    exchange = dist.all_to_all_single(received, flat, group=group, async_op=True)

    def add() -> None:
        exchange.wait()
        first, *others = received.view(group.size(), -1)
        partition.copy_(first)
        for other in others:
            partition.add_(other)
        partition.mul_(1.0 / group.size())

    return add
