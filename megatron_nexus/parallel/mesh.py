"""Mesh: this rank's place among pipeline stages, data-parallel copies and tensor-parallel parts.

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank

so tensor-parallel ranks are neighbours, on the fastest links. All process groups are made here.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megatron_nexus.base.open_files import allow_open_files
from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.world import World

GROUPS = 16
"""Groups of all ranks that a rank may be in, ours and DeepSpeed's: gloo connects each member to each."""


@dataclass(frozen=True)
class Mesh:
    """A rank's coordinates and its process groups.

    `control` is a gloo group of all ranks for barriers and small messages on the host, whatever the
    device; it is used by the checkpoint and the loop, never by the model.
    """

    rank: int
    world_size: int
    device: torch.device
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1


def make_mesh(world: World, tp_size: int, pp_size: int, timeout_s: float = 1800.0) -> Mesh:
    """Start torch.distributed and make the groups of every rank; a collective call.

    gloo on CPU, nccl (with gloo beside it for host tensors) on CUDA devices. The world size is a multiple
    of tp_size x pp_size: the configuration's rules have checked it.
    """
    cuda = torch.cuda.is_available()
    # A launcher may show each task only its own device: `srun --gpus-per-task=1`.
    index = world.local_rank if not cuda or torch.cuda.device_count() > 1 else 0
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        if index >= torch.cuda.device_count():
            raise ConfigError(
                [
                    f"local rank {index} has no device of its own, {torch.cuda.device_count()} are visible: "
                    "start as many ranks on a machine as it has devices"
                ]
            )
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    allow_open_files(GROUPS * world.size)
    # DeepSpeed reads these itself, and looks for MPI where they are missing (srun, mpirun, a plain shell).
    names = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": index}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_connect(world, timeout),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    dp_size = world.size // (tp_size * pp_size)
    rest, tp_rank = divmod(world.rank, tp_size)
    pp_rank, dp_rank = divmod(rest, dp_size)
    ranks = torch.arange(world.size).view(pp_size, dp_size, tp_size)
    tp_group = dp_group = None
    # Every rank takes part in the making of every group, in the same order.
    for members in ranks.reshape(-1, tp_size).tolist():
        group = dist.new_group(members, timeout=timeout)
        tp_group = group if world.rank in members else tp_group
    for members in ranks.movedim(1, 2).reshape(-1, dp_size).tolist():
        group = dist.new_group(members, timeout=timeout)
        dp_group = group if world.rank in members else dp_group
    assert tp_group is not None and dp_group is not None, "every rank is in one group of each kind"
    return Mesh(
        rank=world.rank,
        world_size=world.size,
        device=device,
        pp_rank=pp_rank,
        pp_size=pp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        tp_group=tp_group,
        dp_group=dp_group,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )


def _connect(world: World, timeout: timedelta) -> PrefixStore:
    """The key-value store through which the ranks find each other, served by rank 0.

    Under torchrun the launcher serves it already.
    """
    serves = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            world.master_addr,
            world.master_port,
            world.size,
            serves,
            timeout,
            master_listen_fd=world.listener,
        )
        # torchrun's store outlives a restart: each attempt has its own names in it.
        return PrefixStore(f"attempt_{attempt}", store)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        remedy = (
            "choose another port (deepspeed --master_port, or MASTER_PORT)" if serves else "is rank 0 up?"
        )
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [f"rank {world.rank}: {world.master_addr}:{world.master_port}: {reason}: {remedy}"]
        ) from error


def is_first_failure() -> bool:
    """Return whether this rank is the first to fail: only that one reports its error.

    The others fail because of it: their connections break when it leaves.
    """
    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=2))
        return int(store.add("megatron_nexus/failed", 1)) == 1
    except RuntimeError:
        return False  # rank 0, which serves the store, has left: it failed first


def close_mesh() -> None:
    """Leave torch.distributed; harmless where it was never started."""
    if dist.is_initialized():
        dist.destroy_process_group()
