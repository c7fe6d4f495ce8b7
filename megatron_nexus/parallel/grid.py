"""Grid: a mesh as DeepSpeed asks for it, as `mpu` of an engine and as grid and topology of a PipelineModule.

In place of DeepSpeed's PipelineParallelGrid, which makes its own groups (one for each rank where nothing is
tensor-parallel, by N calls on each of N ranks), takes N^2 / pp steps of Python for pairs of stages, and looks
through all N ranks at each send. In the names of Megatron-LM and DeepSpeed: `slice` and `tensor_model` are
the tensor-parallel ranks, `model` those and all stages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from megatron_nexus.parallel.mesh import Mesh


class Coordinates(NamedTuple):
    """A rank's place, by DeepSpeed's names of the axes."""

    pipe: int
    data: int
    model: int


class Grid:
    """What DeepSpeed reads of the ranks, from a mesh: no call and no group of its own."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.global_rank = mesh.rank
        self.world_size = mesh.world_size
        self.data_parallel_size = mesh.dp_size
        self.pipe_parallel_size = mesh.pp_size
        self.model_parallel_size = mesh.tp_size
        self.stage_id = mesh.pp_rank
        self.data_parallel_id = mesh.dp_rank
        self.pp_group: Sequence[int] = [self.stage_to_global(stage) for stage in range(mesh.pp_size)]

    def get_dim(self, axis: str) -> int:
        """Return the size of the axis "pipe", "data" or "model"."""
        return int(getattr(Coordinates(self._mesh.pp_size, self._mesh.dp_size, self._mesh.tp_size), axis))

    def get_coord(self, rank: int) -> Coordinates:
        """Return the place of a rank."""
        rest, tp_rank = divmod(rank, self._mesh.tp_size)
        return Coordinates(*divmod(rest, self._mesh.dp_size), tp_rank)

    def stage_to_global(self, stage_id: int) -> int:
        """Return the rank of another stage that stands where this one does."""
        mesh = self._mesh
        return (stage_id * mesh.dp_size + mesh.dp_rank) * mesh.tp_size + mesh.tp_rank

    def get_global_rank(self) -> int:
        """Return this rank among all."""
        return self.global_rank

    def get_stage_id(self) -> int:
        """Return the stage of this rank."""
        return self.stage_id

    def get_pipe_parallel_rank(self) -> int:
        """Return the stage of this rank."""
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        """Return the number of stages."""
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of this rank's places in all stages."""
        return self._mesh.pp_group

    def get_data_parallel_rank(self) -> int:
        """Return which copy of the model this rank is part of."""
        return self.data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        """Return the number of copies of the model."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of the ranks that hold the same parameters."""
        return self._mesh.dp_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank among those that hold one copy of the model."""
        return self.stage_id * self.model_parallel_size + self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the number of ranks that hold one copy of the model."""
        return self.pipe_parallel_size * self.model_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of the ranks that hold one copy of the model."""
        return self._mesh.model_group

    def get_slice_parallel_rank(self) -> int:
        """Return this rank among the tensor-parallel ones."""
        return self._mesh.tp_rank

    def get_slice_parallel_world_size(self) -> int:
        """Return the number of tensor-parallel ranks."""
        return self.model_parallel_size

    def get_slice_parallel_group(self) -> dist.ProcessGroup:
        """Return the group of tensor-parallel ranks."""
        return self._mesh.tp_group
