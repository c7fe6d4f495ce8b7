"""Mesh: this rank's place among pipeline stages, data-parallel copies and tensor-parallel parts.

    rank = (pipe * data_size + data) * tensor_size + tensor

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
    pipe: int
    pipe_size: int
    data: int
    data_size: int
    tensor: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pipe == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipe == self.pipe_size - 1


def make_mesh(world: World, tensor_size: int, pipe_size: int, timeout_s: float = 1800.0) -> Mesh:
    """Start torch.distributed and make the groups of every rank; a collective call.

    gloo on CPU, nccl (with gloo beside it for host tensors) on CUDA devices. The world size is a multiple
    of tensor_size x pipe_size: the configuration's rules have checked it.
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
    data_size = world.size // (tensor_size * pipe_size)
    rest, tensor = divmod(world.rank, tensor_size)
    pipe, data = divmod(rest, data_size)
    ranks = torch.arange(world.size).view(pipe_size, data_size, tensor_size)
    tensor_group = data_group = None
    # Every rank takes part in the making of every group, in the same order.
    for members in ranks.reshape(-1, tensor_size).tolist():
        group = dist.new_group(members, timeout=timeout)
        tensor_group = group if world.rank in members else tensor_group
    for members in ranks.movedim(1, 2).reshape(-1, data_size).tolist():
        group = dist.new_group(members, timeout=timeout)
        data_group = group if world.rank in members else data_group
    assert tensor_group is not None and data_group is not None, "every rank is in one group of each kind"
    return Mesh(
        rank=world.rank,
        world_size=world.size,
        device=device,
        pipe=pipe,
        pipe_size=pipe_size,
        data=data,
        data_size=data_size,
        tensor=tensor,
        tensor_size=tensor_size,
        tensor_group=tensor_group,
        data_group=data_group,
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


def claim_last_word() -> bool:
    """Whether this rank, which is about to fail, is the first to: only that one reports its error.

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
