"""Crew: who shares the work of a growth: one process, forked workers, or the ranks of mpirun."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from megatron_nexus.data.team import POLL_S, Team, read_team, wait_for_message
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import Progress

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]

TELL_S = 0.5


class Crew:
    """The processes that grow one checkpoint together; alone, or the ranks of mpirun."""

    def __init__(self, team: Team, workers: int = 1) -> None:
        self._team = team
        self._workers = workers
        self.rank = team.rank
        self.size = team.size

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; a collective call."""
        if self.rank != 0:
            self._team.send(0, (self.rank, value))
            values: list[T] = wait_for_message(self._team)  # type: ignore[assignment]  # of the first rank
            return values
        gathered = {0: value}
        while len(gathered) < self.size:
            for message in self._team.received():
                assert isinstance(message, tuple), f"not sent by gather: {message}"
                gathered[message[0]] = message[1]
            time.sleep(POLL_S)
        values = [gathered[rank] for rank in range(self.size)]
        for rank in range(1, self.size):
            self._team.send(rank, values)
        return values

    def abort(self) -> None:
        """End the other ranks, which would wait for this one for ever."""
        if self.size > 1:
            self._team.abort()

    @contextmanager
    def together(self, purpose: str) -> Iterator[None]:
        """Run a block on every rank: all leave it as from a barrier, or all raise.

        Raises CheckpointError: on some rank the block raised OSError, ConfigError or CheckpointError.
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
        problems = sorted({text for text in self.gather(problem) if text})
        if problems:
            raise CheckpointError("\n".join([purpose, *(f"  {text}" for text in problems)]))

    def share_out(
        self,
        cut: Callable[[int], list[list[T]]],
        work: Callable[[Sequence[T], Advance], R],
        size_of: Callable[[T], int],
        stage: str,
    ) -> list[R]:
        """What `work` makes of each of the shares that `cut` gives for so many workers; all ranks' results.

        `work` tells how much it has done, in the unit of `size_of`; each rank counts its own share.
        """
        shares = cut(self.size * self._workers)
        mine = shares[self.rank * self._workers : (self.rank + 1) * self._workers]
        mine = [share for share in mine if share] or [[]]  # no process without work
        total = sum(size_of(item) for share in mine for item in share)
        results: list[R] = []
        with self.together(stage):
            results = _in_workers(mine, work, stage, total)
        return [result for of_rank in self.gather(results) for result in of_rank]


def describe(error: OSError) -> str:
    """What the system has refused, where, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room, or save to another disk" if full else "save to a folder that can be written"
    where = error.filename or "a file of the new checkpoint"
    return f"{where}: {error.strerror or error}: {remedy}"


def make_crew(workers: int) -> Crew:
    """The crew that this process belongs to.

    Raises ConfigError: workers below 1, or beside mpirun, or mpirun without MPI.
    """
    team = read_team(os.environ)
    if workers < 1:
        raise ConfigError([f"--workers {workers} must be positive: give 1 or more"])
    if team.size > 1 and workers > 1:
        raise ConfigError(
            [f"--workers {workers} beside {team.size} started processes: drop one, both share the same work"]
        )
    return Crew(team, workers)


def _in_workers(
    shares: list[list[T]], work: Callable[[Sequence[T], Advance], R], stage: str, total: int
) -> list[R]:
    """Each share in a forked process of its own; a single one in this process."""
    if len(shares) == 1:
        with Progress(stage, total / 1e6, "MB") as progress:
            return [work(shares[0], lambda amount: progress.advance(amount / 1e6))]
    context = multiprocessing.get_context("fork")
    done = context.RawArray("q", len(shares))
    processes, pipes = [], []
    # Forked before the progress begins: its thread must not hold a lock at that moment.
    for index, share in enumerate(shares):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=_work_and_tell, args=(work, share, sending, done, index), daemon=True
        )
        process.start()
        sending.close()
        processes.append(process)
        pipes.append(receiving)
    try:
        results: dict[Connection, R] = {}
        with Progress(stage, total / 1e6, "MB") as progress:
            while len(results) < len(pipes):
                for pipe in wait([pipe for pipe in pipes if pipe not in results], TELL_S):
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
            "a worker ended without a word, perhaps killed for want of memory: use fewer --workers"
        ) from error
    if problem:
        raise CheckpointError(problem)
    return result  # type: ignore[no-any-return]


def _work_and_tell(
    work: Callable[[Sequence[T], Advance], R],
    share: Sequence[T],
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
        pipe.send(("", work(share, advance)))
    except OSError as error:
        pipe.send((describe(error), None))
    except CheckpointError as error:
        pipe.send((str(error), None))
