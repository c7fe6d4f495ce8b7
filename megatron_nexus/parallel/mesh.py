"""Mesh: this rank's place among pipeline stages, data-parallel copies and tensor-parallel parts.

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank

so tensor-parallel ranks are neighbours, on the fastest links. All process groups are made here.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from megatron_nexus.base.open_files import allow_open_files
from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.devices import device_files, require_own_device, unseen_devices
from megatron_nexus.parallel.host_tree import FANOUT, HostTree
from megatron_nexus.parallel.rendezvous import connect, refuse
from megatron_nexus.parallel.world import World

_CONNECTIONS = 8 * FANOUT
"""Connections of a rank in its host tree, at most; gloo's groups have up to as many as ranks."""


@dataclass(frozen=True)
class Mesh:
    """A rank's coordinates and its process groups.

    `tp_group`, `dp_group` and `pp_group` are the ranks along one axis, `model_group` those that together hold
    one copy of the model, tp x pp; on CUDA devices they are NCCL's and take no tensor of the host. `control`
    is all ranks on the host, for the checkpoint and the loop.
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
    pp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    control: HostTree
    node_groups: tuple[dist.ProcessGroup, ...] = ()
    """Of the ranks of `dp_group`, those on this rank's node, and those in its place on the other nodes."""

    @property
    def reduction_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups over which gradients are reduced in turn."""
        return self.node_groups or (self.dp_group,)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def gather_from_stages(self, message: str) -> list[str]:
        """Return the messages of the first rank of each stage on every rank; a collective call."""
        is_first = self.dp_rank == self.tp_rank == 0
        return self.control.all_gather_str(message if is_first else "")[:: self.dp_size * self.tp_size]

    def set_timeout(self, timeout_s: float) -> None:
        """Set how long a rank waits for others in collectives of the model; a collective call.

        Ranks wait for the checkpoint and for evaluation in `control`, which keeps its own.
        """
        self.control.barrier()  # no rank is still in a collective that may take longer
        groups = {self.tp_group, self.dp_group, self.pp_group, self.model_group, *self.node_groups}
        for group in {dist.group.WORLD, *groups}:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def make_mesh(
    world: World, tp_size: int, pp_size: int, timeout_s: float = 1800.0, by_node: bool = False
) -> Mesh:
    """Start torch.distributed and make the groups of every rank; a collective call.

    With `by_node` also `node_groups`, unless each or all of the data-parallel ranks are on one node. Raises
    ConfigError where nodes do not hold equally many.

    gloo on CPUs, NCCL on CUDA devices. A group is made by its members alone, so that no rank makes more than
    its own few. The world size is a multiple of tp_size x pp_size: the configuration's rules have checked it.
    """
    try:
        device = _own_device(world.local_rank)
    except ConfigError as error:
        refuse(world, str(error))
        raise
    timeout = timedelta(seconds=timeout_s)
    dp_size = world.size // (tp_size * pp_size)
    store = _start_distributed(world, device, timeout)
    # Before NCCL's groups: ranks that share a device would fail in them with fewer words.
    control = HostTree(world.rank, world.size, store, timeout, world.local_size)
    uuid = "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    require_own_device(control, socket.gethostname(), device.type, uuid)
    rest, tp_rank = divmod(world.rank, tp_size)
    pp_rank, dp_rank = divmod(rest, dp_size)
    per_stage = dp_size * tp_size

    def group(ranks: Sequence[int]) -> dist.ProcessGroup:
        return _connected_group(ranks, device, timeout)

    tp_group = group(range(rest * tp_size, (rest + 1) * tp_size))
    copies = range(pp_rank * per_stage + tp_rank, (pp_rank + 1) * per_stage, tp_size)
    dp_group = group(copies)
    node_groups = _node_groups(world.rank, copies, tp_size, control.node_size, group) if by_node else ()
    pp_group = group(range(dp_rank * tp_size + tp_rank, world.size, per_stage))
    if pp_size == 1:
        model_group = tp_group
    elif tp_size == 1:
        model_group = pp_group
    else:
        stages = range(dp_rank * tp_size, world.size, per_stage)
        model_group = group([first + part for first in stages for part in range(tp_size)])
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
        pp_group=pp_group,
        model_group=model_group,
        control=control,
        node_groups=node_groups,
    )


def _start_distributed(world: World, device: torch.device, timeout: timedelta) -> Store:
    """Start torch.distributed, and return the store that all ranks share."""
    allow_open_files(_CONNECTIONS + 4 * world.size)
    # DeepSpeed reads these itself, and looks for MPI where they are missing (srun, mpirun, a plain shell).
    index = world.local_rank if device.index is None else device.index
    names = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": index}
    os.environ.update({name: str(value) for name, value in names.items()})
    # Else gloo connects each rank of a group with each other at once, in the group of all ranks too.
    if not torch.__version__.startswith("2.10."):  # which prints of each rank that it is not connected
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    store = connect(world, timeout)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    return store


def _node_groups(
    rank: int,
    copies: range,
    tp_size: int,
    node_size: int,
    group: Callable[[Sequence[int]], dist.ProcessGroup],
) -> tuple[dist.ProcessGroup, ...]:
    """Make a rank's `Mesh.node_groups` of the data-parallel ranks `copies`."""
    per_stage = len(copies) * tp_size
    if not 1 < min(node_size, per_stage) // tp_size < len(copies):
        return ()
    require_whole_nodes(node_size, tp_size, per_stage)
    near = [other for other in copies if other // node_size == rank // node_size]
    return group(near), group(copies[near.index(rank) :: len(near)])


def require_whole_nodes(node_size: int, tp_size: int, per_stage: int) -> None:
    """Raise ConfigError where a stage's ranks are not whole nodes, each of whole tensor-parallel groups."""
    if node_size % tp_size or per_stage % node_size:
        raise ConfigError(
            f"--hierarchical-grad-reduce: the {per_stage} ranks of a pipeline stage are not whole nodes "
            f"of {node_size} ranks, each of whole copies of --tp {tp_size}: leave the flag out, or "
            "change --tp, --pp or the ranks of a node"
        )


def _own_device(local_rank: int) -> torch.device:
    """Choose this rank's device. Raises ConfigError where it has none of its own."""
    if not torch.cuda.is_available():
        if problem := unseen_devices(device_files(), torch.version.cuda or torch.version.hip, os.environ):
            raise ConfigError([problem])
        return torch.device("cpu")
    # A launcher may show each task only its own device: `srun --gpus-per-task=1`.
    index = local_rank if torch.cuda.device_count() > 1 else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {index} has no device of its own, {torch.cuda.device_count()} are visible: "
            "start as many ranks on a machine as it has devices"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _connected_group(ranks: Sequence[int], device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """Make the group of `ranks`, called by these alone, and a first sum: a broken network fails here."""
    group = dist.new_group(list(ranks), timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "this rank is one of them"
    if len(ranks) > 1:
        count = torch.ones(1, device=device)
        dist.all_reduce(count, group=group)
        assert count.item() == len(ranks), f"{len(ranks)} ranks, and their sum of ones is {count.item()}"
    return group


def first_failure(exit_code: int) -> tuple[bool, int]:
    """Return whether this rank is the first to fail, and the exit code of the first.

    Only that one reports its error. The others fail because of it: their connections break when it leaves.
    """
    if not dist.is_initialized():
        return True, exit_code
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=2))
        is_first = int(store.add("megatron_nexus/failed", 1)) == 1
        if is_first:
            store.set("megatron_nexus/exit_code", str(exit_code))
        return is_first, int(store.get("megatron_nexus/exit_code"))
    except RuntimeError:
        # Rank 0, which serves the store, has left: it failed first, and its code is the one that counts.
        return False, 1


def close_mesh() -> None:
    """Leave torch.distributed; harmless where it was never started."""
    if dist.is_initialized():
        dist.destroy_process_group()
