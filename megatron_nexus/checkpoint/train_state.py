"""The face between checkpoints and the engine that trains: what is saved of a rank, and how it is put back.

`training/zero_state.py` is this of DeepSpeed's ZeRO optimizers. Another engine needs another class and no
change here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_nexus.checkpoint.data_file import Chunk
from megatron_nexus.checkpoint.manifest import EngineRecord, JsonObject, Topology
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box


@dataclass(frozen=True)
class StateView:
    """A box of a parameter, with views of the memory that holds its state.

    `values` has the fp32 master weights and Adam's moments (fp32, exp_avg, exp_avg_sq), each of the shape of
    `box`.
    """

    spec: ParamSpec
    box: Box
    values: Mapping[str, Tensor]

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield the chunk of each state with its view."""
        for state, view in self.values.items():
            yield Chunk(self.spec.name, state, self.box), view


class TrainState(Protocol):
    """The training state of one rank."""

    step_count: int
    """Adam's step count."""
    counters: EngineRecord
    """The engine's counters, between two optimizer steps."""

    @property
    def specs(self) -> Mapping[str, ParamSpec]:
        """The parameters of this rank's pipeline stage, by logical name."""

    @property
    def groups(self) -> dict[str, JsonObject]:
        """The hyper-parameters of each parameter group, by the group's name."""

    def restore_groups(self, groups: Mapping[str, JsonObject]) -> None:
        """Take over the hyper-parameters of the groups of the same names. Raises CheckpointError."""

    def views(self) -> Iterator[StateView]:
        """Yield the boxes whose state lies on this rank."""

    def clear(self) -> None:
        """Set weights, moments and all padding to zero."""

    def refresh_model(self) -> None:
        """Cast the loaded master weights into the model's parameters; a collective call."""


def topology_of(mesh: Mesh) -> Topology:
    """Return how the ranks of this run are arranged."""
    return Topology(mesh.world_size, mesh.pp_size, mesh.dp_size, mesh.tp_size)


def random_states(mesh: Mesh) -> dict[str, bytes]:
    """Return the states of this rank's random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return {name: state.numpy().tobytes() for name, state in states.items()}


def restore_random_states(states: Mapping[str, bytes], mesh: Mesh) -> None:
    """Set this rank's random generators; those of devices that are missing stay as they are."""
    tensors = {name: torch.frombuffer(bytearray(s), dtype=torch.uint8) for name, s in states.items()}
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if mesh.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], mesh.device)
