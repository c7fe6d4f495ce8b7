"""A rank that may have few files open when it makes the mesh."""

import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from tests.support.waiting import TIMEOUT_S


def main() -> None:
    in_use = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    # Enough for one group of two ranks, not for four groups of four.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(in_use) + 16, hard))
    mesh = make_mesh(read_world(os.environ), tp_size=1, pp_size=1, timeout_s=TIMEOUT_S)
    total = torch.ones(1)
    dist.all_reduce(total, group=mesh.dp_group)
    assert total.item() == mesh.world_size
    close_mesh()


if __name__ == "__main__":
    main()
