"""A rank that may have few files open when it makes the mesh; gradients reduced by node and at once."""

import os
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.config.command_line import build
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.parallel.data_parallel import MeanReduction
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.planner.traffic import FP32, StageSize, data_parallel_traffic
from megatron_nexus.training.machine import PeakMemory, peak_memory_bytes
from tests.support.waiting import TIMEOUT_S

NODE, PART, BUCKETS = 2, 3, 3


def reduced(mesh: Mesh, groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """This rank's partitions of some buckets, of which rank r has the numbers (r + 1) i in bucket i / length.

    They are whole: sums are exact in every order.
    """
    buckets = torch.arange(BUCKETS * mesh.dp_size * PART).float().view(BUCKETS, -1) * (mesh.rank + 1)
    begun: list[MeanReduction] = []
    own = slice(mesh.dp_rank * PART, (mesh.dp_rank + 1) * PART)
    for flat in buckets:
        if begun:
            begun[-1].advance()
        begun.append(MeanReduction(flat, flat[own], groups))
    for reduction in begun:
        reduction.finish()
    return [flat[own] for flat in buckets]


def check_reduction(mesh: Mesh) -> None:
    """Both ways give the mean; by node a rank sends a half of the elements, or less, to other nodes.

    The bytes are those that the planner has.
    """
    sent: Counter[bool] = Counter()
    real = dist.all_to_all_single

    def counted(received: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool) -> object:
        for other in set(dist.get_process_group_ranks(group)) - {mesh.rank}:
            sent[other // NODE != mesh.rank // NODE] += x.numel() // group.size()
        return real(received, x, group=group, async_op=async_op)

    dist.all_to_all_single = counted
    flat = reduced(mesh, (mesh.dp_group,))
    across_at_once = sent[True]
    sent.clear()
    by_node = reduced(mesh, mesh.reduction_groups)
    dist.all_to_all_single = real
    mean = sum(range(1, mesh.dp_size + 1)) / mesh.dp_size
    whole = torch.arange(BUCKETS * mesh.dp_size * PART).float().view(BUCKETS, mesh.dp_size, PART) * mean
    for one, other, expected in zip(flat, by_node, whole[:, mesh.dp_rank], strict=True):
        assert torch.equal(one, expected) and torch.equal(other, expected)
    nodes = mesh.dp_size // NODE
    assert across_at_once == BUCKETS * PART * (mesh.dp_size - NODE)
    assert sent[True] == BUCKETS * PART * (nodes - 1) == across_at_once // NODE
    config = build({"global_batch_size": 8 * mesh.dp_size, "hierarchical_grad_reduce": True})
    size = StageSize(BUCKETS * PART * mesh.dp_size, BUCKETS)
    planned = data_parallel_traffic(config, mesh.world_size, size, NODE).by_node
    assert planned is not None
    assert (planned.within, planned.across) == (FP32 * sent[False], FP32 * sent[True])


def check_memory(mesh: Mesh) -> None:
    """The memory of a step's metrics is that of the rank that has held most, shared at the interval."""
    memory, last = PeakMemory(mesh, log_interval=2, beacon=Beacon()), mesh.world_size - 1
    first = memory.bytes_after(1)
    held = torch.ones(first // 4 if mesh.rank == last else 1)  # as much as any rank has held before
    told = memory.bytes_after(3)
    assert told >= peak_memory_bytes(mesh) and (told > 1.3 * first) == (mesh.rank == last)
    shared = memory.bytes_after(4)
    assert len(set(mesh.control.all_gather_str(str(shared)))) == 1
    assert shared >= 1.3 * first, f"{shared:,} bytes, not as much more than {first:,} as the last rank took"
    del held


def main() -> None:
    in_use = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    # Enough for one group of two ranks, not for four groups of four.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(in_use) + 16, hard))
    world = replace(read_world(os.environ), local_size=NODE)
    mesh = make_mesh(world, tp_size=1, pp_size=1, timeout_s=TIMEOUT_S, by_node=True)
    total = torch.ones(1)
    dist.all_reduce(total, group=mesh.dp_group)
    assert total.item() == mesh.world_size
    assert [group.size() for group in mesh.node_groups] == [NODE, mesh.world_size // NODE]
    check_reduction(mesh)
    check_memory(mesh)
    close_mesh()


if __name__ == "__main__":
    main()
