"""One of two ranks, of which the second is late: in the first step, outside the model, and in later steps."""

import os
import time

import torch
import torch.distributed as dist

from megatron_nexus.parallel.collective_failure import describe_collective_failure
from megatron_nexus.parallel.mesh import make_mesh
from megatron_nexus.parallel.world import read_world
from tests.support.waiting import TIMEOUT_S

SHORT_S, LATE_S = 0.5, 1.0


def main() -> None:
    mesh = make_mesh(read_world(os.environ), tp_size=1, pp_size=1, timeout_s=TIMEOUT_S)

    def be_late() -> None:
        if mesh.rank == 1:
            time.sleep(LATE_S)

    groups = (mesh.dp_group, dist.group.WORLD)
    be_late()
    for (
        group
    ) in groups:  # gloo may connect the ranks of a group here only, and waits as long as it was made with
        dist.all_reduce(torch.ones(1), group=group)
    mesh.set_timeout(SHORT_S)
    be_late()
    mesh.control.barrier()
    dist.all_reduce(torch.ones(1), group=mesh.dp_group)
    for group in groups:
        if mesh.rank == 0:
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                message = describe_collective_failure(error, mesh.rank)
                assert "--distributed-timeout-seconds-after-init" in message, error
                assert f"{1000 * SHORT_S:.0f}ms" in message, error
            else:
                raise AssertionError("the other rank has not called it")
        mesh.control.barrier()  # the other rank waits here, and so long
    os._exit(0)  # the groups are broken, as after any time-out


if __name__ == "__main__":
    main()
