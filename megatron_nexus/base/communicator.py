"""Ranks of a preprocessing run: one process, or those that mpirun or srun started, through mpi4py.

Nothing here is collective and nothing waits busily: MPI's own waiting would take the cores that tokenize.
"""

import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from megatron_nexus.errors import ConfigError

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where Open MPI, MPICH and SLURM say how many processes they started."""

POLL_S = 0.02


class Communicator(Protocol):
    """The processes that share the work; rank 0 leads."""

    rank: int
    size: int
    cores: int
    """Cores of this machine that this rank should use."""

    def send(self, rank: int, message: object) -> None:
        """Send a picklable message; may wait until `rank` looks for messages."""

    def received(self) -> Iterator[object]:
        """Yield the messages that have arrived since the last call, those of one sender in order."""

    def abort(self) -> None:
        """End all ranks at once."""


class SingleProcess:
    """One process."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.cores = len(os.sched_getaffinity(0))

    def send(self, rank: int, message: object) -> None:
        raise AssertionError(f"there is no rank {rank} to send {message} to")

    def received(self) -> Iterator[object]:
        yield from ()

    def abort(self) -> None:
        raise AssertionError("one process ends by itself")


class MpiCommunicator:
    """The processes of an MPI world. Ranks of one machine that may use the same cores share them."""

    def __init__(self, world: "MPI.Comm") -> None:
        from mpi4py import MPI

        self._world = world
        self.rank: int = world.Get_rank()
        self.size: int = world.Get_size()
        cores = os.sched_getaffinity(0)
        machine = world.Split_type(MPI.COMM_TYPE_SHARED)
        same = machine.allgather(cores).count(cores)
        machine.Free()
        self.cores = max(1, len(cores) // same)

    def send(self, rank: int, message: object) -> None:
        """Send a picklable message; may wait until `rank` looks for messages."""
        self._world.send(message, rank)

    def received(self) -> Iterator[object]:
        """Yield the messages that have arrived since the last call, those of one sender in order."""
        while self._world.iprobe():
            yield self._world.recv()

    def abort(self) -> None:
        """End all ranks at once."""
        self._world.Abort(1)


def wait_for_message(comm: Communicator) -> object:
    """Wait for the next message and return it."""
    while True:
        for message in comm.received():
            return message
        time.sleep(POLL_S)


def get_communicator(environment: Mapping[str, str]) -> Communicator:
    """Return the communicator of the processes that the environment describes.

    Raises:
        ConfigError: several processes were started, and MPI is missing or of another kind.
    """
    started = next((int(environment[name]) for name in SIZES if environment.get(name, "").isdigit()), 1)
    if started == 1:
        return SingleProcess()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            [
                f"{started} processes were started and MPI cannot be used ({str(error).splitlines()[0]}): "
                "pip install mpi4py beside an MPI library, or start one process"
            ]
        ) from None
    size = MPI.COMM_WORLD.Get_size()
    if size != started:
        raise ConfigError(
            [
                f"{started} processes were started, but MPI's world has {size}: use the mpirun of the MPI "
                "library that mpi4py finds, under srun the option --mpi=pmix, or start one process"
            ]
        )
    return MpiCommunicator(MPI.COMM_WORLD)
