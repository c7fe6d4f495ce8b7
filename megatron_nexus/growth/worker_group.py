"""The processes that share the work of a growth: one process, forked workers, or the ranks of mpirun."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from megatron_nexus.base.communicator import Communicator, get_communicator, raise_on_all_ranks
from megatron_nexus.base.workers import worker_pool
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import Progress

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]
Work = Callable[[Sequence[T], Advance], R]
"""Work on a part of the items, which reports what it has done."""

PARTS = 4
"""Parts of the work for each worker: a quarter of a part is what the last one may have to wait for."""


class WorkerGroup:
    """The ranks of a communicator, with workers of their own where there is one rank."""

    def __init__(self, comm: Communicator, workers: int = 1) -> None:
        self.comm = comm
        self._workers = workers

    @contextmanager
    def aborted_on_error(self) -> Iterator[None]:
        """End the other ranks if the block fails with what they cannot know of; they would wait for ever."""
        try:
            yield
        except CheckpointError:
            raise
        except BaseException:
            if self.comm.size > 1:
                self.comm.abort()
            raise

    def map_partitions(
        self, items: Sequence[T], size_of: Callable[[T], int], work: Work[T, R], stage: str
    ) -> list[R]:
        """Return the results of `work` on parts of `items` of about equal size, of all ranks; collective.

        `work` reports what it has done in the unit of `size_of`; each rank shows the progress of its own.
        """
        mine = split(items, size_of, self.comm.size)[self.comm.rank]
        results: list[R] = []
        with raise_on_all_ranks(self.comm, stage, describe=os_error_message):
            if self._workers == 1:
                with _progress(stage, mine, size_of) as progress:
                    results = [work(mine, progress.advance)]
            else:
                results = self._in_workers(mine, size_of, work, stage)
        return [result for of_rank in self.comm.gather(results) for result in of_rank]

    def _in_workers(
        self, items: Sequence[T], size_of: Callable[[T], int], work: Work[T, R], stage: str
    ) -> list[R]:
        parts = [part for part in split(items, size_of, PARTS * self._workers) if part]
        with worker_pool(max(1, min(self._workers, len(parts))), "fork") as pool:
            # Forked before the progress begins: its thread must not hold a lock at that moment.
            futures = {pool.submit(work, part, _ignore): sum(map(size_of, part)) for part in parts}
            with _progress(stage, items, size_of) as progress:
                try:
                    for future in as_completed(futures):
                        future.result()
                        progress.advance(futures[future])
                except BrokenProcessPool as error:
                    raise CheckpointError(
                        "a worker exited without an error message, perhaps killed for lack of memory: use "
                        "fewer --workers"
                    ) from error
            return [future.result() for future in futures]


def _progress(stage: str, items: Sequence[T], size_of: Callable[[T], int]) -> Progress:
    return Progress(stage, sum(map(size_of, items)), "MB")


def _ignore(amount: int) -> None:
    """Report nothing: a worker's progress shows when it has finished a part."""


def split(items: Sequence[T], size_of: Callable[[T], int], parts: int) -> list[list[T]]:
    """Cut a sequence into runs of about equal size, some of them perhaps empty."""
    total = sum(map(size_of, items))
    runs: list[list[T]] = [[] for _ in range(parts)]
    done = 0
    for item in items:
        runs[min(parts - 1, done * parts // max(1, total))].append(item)
        done += size_of(item)
    return runs


def os_error_message(error: OSError) -> str:
    """Say what the system has refused, where, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room, or save to another disk" if full else "save to a folder that can be written"
    where = error.filename or "a file of the new checkpoint"
    return f"{where}: {error.strerror or error}: {remedy}"


def make_worker_group(workers: int) -> WorkerGroup:
    """Return the group that this process belongs to.

    Raises ConfigError: workers below 1, or together with mpirun, or mpirun without MPI.
    """
    comm = get_communicator(os.environ)
    if workers < 1:
        raise ConfigError(f"--workers {workers} must be positive: give 1 or more")
    if comm.size > 1 and workers > 1:
        raise ConfigError(
            f"--workers {workers} under {comm.size} started processes: drop one, both split the same work"
        )
    return WorkerGroup(comm, workers)
