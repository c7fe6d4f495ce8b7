"""Grid: a mesh as DeepSpeed asks for it, as `mpu` of an engine and as grid and topology of a PipelineModule.

In place of DeepSpeed's PipelineParallelGrid, which makes its own groups (one for each rank where nothing is
tensor-parallel, by N calls on each of N ranks), takes N^2 / pp steps of Python for pairs of stages, and looks
through all N ranks at each send. In the names of Megatron-LM and DeepSpeed: `slice` and `tensor_model` are
the tensor-parallel ranks, `model` those and all stages.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_nexus.parallel.mesh import Mesh

_CALLS = {
    "get_global_rank": "rank",
    "get_stage_id": "pp_rank",
    "get_pipe_parallel_rank": "pp_rank",
    "get_pipe_parallel_world_size": "pp_size",
    "get_pipe_parallel_group": "pp_group",
    "get_data_parallel_rank": "dp_rank",
    "get_data_parallel_world_size": "dp_size",
    "get_data_parallel_group": "dp_group",
    "get_model_parallel_group": "model_group",
    "get_slice_parallel_rank": "tp_rank",
    "get_slice_parallel_world_size": "tp_size",
    "get_slice_parallel_group": "tp_group",
}
"""Functions without arguments that DeepSpeed calls, and what each returns of the mesh."""


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

    def get_model_parallel_rank(self) -> int:
        """Return this rank among those that hold one copy of the model."""
        return self._mesh.pp_rank * self._mesh.tp_size + self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the number of ranks that hold one copy of the model."""
        return self._mesh.pp_size * self._mesh.tp_size

    def __getattr__(self, name: str) -> Callable[[], Any]:
        """Return one of the functions of `_CALLS`."""
        if name not in _CALLS:
            raise AttributeError(name)
        return partial(getattr, self._mesh, _CALLS[name])
