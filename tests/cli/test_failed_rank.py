"""A rank that fails because of another one leaves with the exit code of that one."""

import multiprocessing
import os
import signal
import threading

import torch.distributed as dist

from megatron_nexus.cli.rank_process import end_failed_rank
from megatron_nexus.errors import EXIT_CODE_RESTART, RestartError
from megatron_nexus.parallel.world import World


def ended_by_its_launcher() -> None:
    """Be the second rank to fail, and get SIGTERM while the first speaks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    store = dist.distributed_c10d._get_default_store()
    store.add("megatron_nexus/failed", 1)
    store.set("megatron_nexus/exit_code", str(EXIT_CODE_RESTART))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    end_failed_rank(RestartError("a connection broke"), World("srun", 1, 2, 1, 2, "127.0.0.1", 1))


def test_a_rank_that_srun_ends_leaves_with_the_code_of_the_first_to_fail() -> None:
    # srun gives the highest of all codes: 143 of this rank would hide 75, which means "start again".
    rank = multiprocessing.get_context("fork").Process(target=ended_by_its_launcher)
    rank.start()
    rank.join(60)
    assert rank.exitcode == EXIT_CODE_RESTART
