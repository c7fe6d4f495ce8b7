"""The processes that share the work of a growth: one process, forked workers, or the ranks of mpirun."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from megatron_nexus.base.communicator import POLL_S, Communicator, get_communicator, wait_for_message
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import Progress

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]

PROGRESS_S = 0.5


class WorkerGroup:
    """The processes that grow one checkpoint together; alone, or the ranks of mpirun."""

    def __init__(self, comm: Communicator, workers: int = 1) -> None:
        self._comm = comm
        self._workers = workers
        self.rank = comm.rank
        self.size = comm.size

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; a collective call."""
        if self.rank != 0:
            self._comm.send(0, (self.rank, value))
            values: list[T] = wait_for_message(self._comm)  # type: ignore[assignment]  # of the first rank
            return values
        gathered = {0: value}
        while len(gathered) < self.size:
            for message in self._comm.received():
                assert isinstance(message, tuple), f"not sent by gather: {message}"
                gathered[message[0]] = message[1]
            time.sleep(POLL_S)
        values = [gathered[rank] for rank in range(self.size)]
        for rank in range(1, self.size):
            self._comm.send(rank, values)
        return values

    def abort(self) -> None:
        """End the other ranks, which would wait for this one for ever."""
        if self.size > 1:
            self._comm.abort()

    @contextmanager
    def raise_on_all_ranks(self, purpose: str) -> Iterator[None]:
        """Run a block on every rank: all leave it as from a barrier, or all raise.

        Raises CheckpointError: on some rank the block raised OSError, ConfigError or CheckpointError.
        """
        problem = ""
        try:
            yield
        except ConfigError as error:
            problem = "; ".join(error.problems)
        except OSError as error:
            problem = os_error_message(error)
        except CheckpointError as error:
            problem = str(error)
        problems = sorted({text for text in self.gather(problem) if text})
        if problems:
            raise CheckpointError("\n".join([purpose, *(f"  {text}" for text in problems)]))

    def map_partitions(
        self,
        cut: Callable[[int], list[list[T]]],
        work: Callable[[Sequence[T], Advance], R],
        size_of: Callable[[T], int],
        stage: str,
    ) -> list[R]:
        """Return the results of `work` on each partition that `cut` makes, of all ranks.

        `work` tells how much it has done, in the unit of `size_of`; each rank counts its own partition.
        """
        partitions = cut(self.size * self._workers)
        mine = partitions[self.rank * self._workers : (self.rank + 1) * self._workers]
        mine = [partition for partition in mine if partition] or [[]]  # no process without work
        total = sum(size_of(item) for partition in mine for item in partition)
        results: list[R] = []
        with self.raise_on_all_ranks(stage):
            results = _in_workers(mine, work, stage, total)
        return [result for of_rank in self.gather(results) for result in of_rank]


def os_error_message(error: OSError) -> str:
    """What the system has refused, where, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room, or save to another disk" if full else "save to a folder that can be written"
    where = error.filename or "a file of the new checkpoint"
    return f"{where}: {error.strerror or error}: {remedy}"


def make_worker_group(workers: int) -> WorkerGroup:
    """The group that this process belongs to.

    Raises ConfigError: workers below 1, or beside mpirun, or mpirun without MPI.
    """
    comm = get_communicator(os.environ)
    if workers < 1:
        raise ConfigError([f"--workers {workers} must be positive: give 1 or more"])
    if comm.size > 1 and workers > 1:
        raise ConfigError(
            [f"--workers {workers} beside {comm.size} started processes: drop one, both split the same work"]
        )
    return WorkerGroup(comm, workers)


def _in_workers(
    partitions: list[list[T]], work: Callable[[Sequence[T], Advance], R], stage: str, total: int
) -> list[R]:
    """Each partition in a forked process of its own; a single one in this process."""
    if len(partitions) == 1:
        with Progress(stage, total / 1e6, "MB") as progress:
            return [work(partitions[0], lambda amount: progress.advance(amount / 1e6))]
    context = multiprocessing.get_context("fork")
    done = context.RawArray("q", len(partitions))
    processes, pipes = [], []
    # Forked before the progress begins: its thread must not hold a lock at that moment.
    for index, partition in enumerate(partitions):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_worker, args=(work, partition, sending, done, index), daemon=True
        )
        process.start()
        sending.close()
        processes.append(process)
        pipes.append(receiving)
    try:
        results: dict[Connection, R] = {}
        with Progress(stage, total / 1e6, "MB") as progress:
            while len(results) < len(pipes):
                for pipe in wait([pipe for pipe in pipes if pipe not in results], PROGRESS_S):
                    assert isinstance(pipe, Connection)
                    results[pipe] = _result_of(pipe)
                progress.done = sum(done) / 1e6
        return [results[pipe] for pipe in pipes]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _result_of(pipe: Connection) -> R:  # type: ignore[type-var]  # the sender's R
    try:
        problem, result = pipe.recv()
    except EOFError as error:
        raise CheckpointError(
            "a worker exited without an error message, perhaps killed for lack of memory: use fewer --workers"
        ) from error
    if problem:
        raise CheckpointError(problem)
    return result  # type: ignore[no-any-return]


def _run_worker(
    work: Callable[[Sequence[T], Advance], R],
    partition: Sequence[T],
    pipe: Connection,
    done: "list[int]",
    index: int,
) -> None:
    # Ctrl-C reaches the first process too, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def advance(amount: int) -> None:
        done[index] += amount

    try:
        pipe.send(("", work(partition, advance)))
    except OSError as error:
        pipe.send((os_error_message(error), None))
    except CheckpointError as error:
        pipe.send((str(error), None))
