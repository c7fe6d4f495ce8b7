"""Ranks that share a work without torch: one process, or those that mpirun or srun started, through mpi4py.

Nothing waits busily: MPI's own waiting would take the cores that work.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_nexus.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mpi4py import MPI

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where Open MPI, MPICH and SLURM say how many processes they started."""

POLL_S = 0.02

T = TypeVar("T")


class Ranks(Protocol):
    """The processes that do something together, of which rank 0 leads: of torch.distributed, MPI, or one."""

    @property
    def rank(self) -> int:
        """The rank of this process."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def all_gather_str(self, message: str) -> list[str]:
        """Return the message of every rank on every rank; a collective call."""


class Communicator(Ranks, Protocol):
    """Ranks that exchange picklable messages."""

    cores: int
    """Cores of this machine that this rank should use."""

    def send(self, rank: int, message: object) -> None:
        """Send a picklable message; may wait until `rank` looks for messages."""

    def received(self) -> Iterator[object]:
        """Yield the messages that have arrived since the last call, those of one sender in order."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on every rank; a collective call."""

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

    def gather(self, value: T) -> list[T]:
        return [value]

    def all_gather_str(self, message: str) -> list[str]:
        return [message]

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
        self._world.send(message, rank)

    def received(self) -> Iterator[object]:
        while self._world.iprobe():
            yield self._world.recv()

    def gather(self, value: T) -> list[T]:
        if self.rank != 0:
            self.send(0, (self.rank, value))
            values: list[T] = wait_for_message(self)  # type: ignore[assignment]  # of rank 0
            return values
        gathered = {0: value}
        while len(gathered) < self.size:
            for message in self.received():
                assert isinstance(message, tuple), f"not sent by gather: {message}"
                gathered[message[0]] = message[1]
            time.sleep(POLL_S)
        values = [gathered[rank] for rank in range(self.size)]
        for rank in range(1, self.size):
            self.send(rank, values)
        return values

    def all_gather_str(self, message: str) -> list[str]:
        return self.gather(message)

    def abort(self) -> None:
        self._world.Abort(1)


@contextmanager
def raise_on_all_ranks(
    ranks: Ranks, purpose: str, remedy: str = "", describe: Callable[[OSError], str] = str
) -> Iterator[None]:
    """Run the block on every rank; if it fails on any, raise CheckpointError on all of them.

    So no rank waits for one that has failed, and all leave the block as from a barrier. The error lists the
    problem of each rank after `purpose`, and `remedy`; `describe` makes the text of an OSError.

    Raises:
        CheckpointError: on some rank the block raised OSError, ConfigError or CheckpointError.
    """
    problem = ""
    try:
        yield
    except ConfigError as error:
        problem = "; ".join(error.problems)
    except OSError as error:
        problem = describe(error)
    except CheckpointError as error:
        problem = str(error)
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(ranks.all_gather_str(problem)):
        if text:
            ranks_of.setdefault(text, []).append(rank)
    if ranks_of:
        lines = [
            f"  rank {', '.join(map(str, who))}: {text}" if ranks.size > 1 else f"  {text}"
            for text, who in ranks_of.items()
        ]
        raise CheckpointError("\n".join([purpose, *lines, *([f"  {remedy}"] if remedy else [])]))


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
            f"{started} processes were started and MPI cannot be used ({str(error).splitlines()[0]}): "
            "pip install mpi4py with an MPI library, or start one process"
        ) from None
    size = MPI.COMM_WORLD.Get_size()
    if size != started:
        raise ConfigError(
            f"{started} processes were started, but MPI's world has {size}: use the mpirun of the MPI "
            "library that mpi4py finds, under srun the option --mpi=pmix, or start one process"
        )
    return MpiCommunicator(MPI.COMM_WORLD)
