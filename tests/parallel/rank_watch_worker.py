"""One rank of the tests of the rank watch: a loop of steps with a collective, in which a fault happens.

Usage: rank_watch_worker.py FAULT RANK FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nexus.errors import RestartError
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.rank_watch import RankWatch
from megatron_nexus.parallel.world import read_world
from tests.support.waiting import TIMEOUT_S

STEP_TIMEOUT_S, STEPS, FAULTY_STEP = 1.0, 6, 5


def fail(fault: str) -> None:
    match fault:
        case "frozen" | "frozen after a long phase":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "slow":
            while True:
                time.sleep(0.1)


def main() -> None:
    fault, faulty, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    world = read_world(os.environ)
    mesh = make_mesh(world, tp_size=1, pp_size=1, timeout_s=TIMEOUT_S)
    beacon = Beacon()
    elsewhere_s = TIMEOUT_S if fault not in ("stuck", "save") else 2 * STEP_TIMEOUT_S
    watch = RankWatch(world, mesh.control, beacon, STEP_TIMEOUT_S, elsewhere_s, folder, by_phase=False)
    try:
        with watch.naming_lost_ranks():
            for step in range(1, STEPS + 1):
                with beacon.in_step(step):
                    if step == FAULTY_STEP and mesh.rank == faulty:
                        fail(fault)
                    beacon.mark(Phase.FORWARD)
                    dist.all_reduce(torch.ones(1), group=mesh.dp_group)
                if step == FAULTY_STEP - 1 and fault == "frozen after a long phase":
                    beacon.mark(Phase.EVALUATION)  # all ranks have said so when they go on
                    time.sleep(1.5 * STEP_TIMEOUT_S)
                    mesh.control.barrier()
                if step == FAULTY_STEP and fault == "evaluation":
                    beacon.mark(Phase.EVALUATION)
                    if mesh.rank == faulty:
                        time.sleep(3 * STEP_TIMEOUT_S)
                    mesh.control.barrier()
                if step == FAULTY_STEP and fault == "stuck":  # all of them, as on a file system
                    beacon.mark(Phase.CHECKPOINT)
                    time.sleep(TIMEOUT_S)
                if step == FAULTY_STEP and fault == "save":  # longer than `elsewhere_s`, but it goes on
                    beacon.mark(Phase.CHECKPOINT)
                    for _ in range(16):
                        time.sleep(STEP_TIMEOUT_S / 5)
                        beacon.goes_on(Phase.CHECKPOINT)
                    beacon.goes_on(Phase.EVALUATION)
                    assert beacon.read()[0].phase == Phase.CHECKPOINT
                if step == FAULTY_STEP and fault == "hook" and mesh.rank == faulty:
                    time.sleep(3 * STEP_TIMEOUT_S)  # the others are in the next step, and wait for it
    except RestartError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
    mesh.control.barrier()
    watch.end()
    mesh.control.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
