"""Rank watch: finds the rank that hangs, names it, and has the others leave with the exit code for a restart.

A thread of each rank reads the rank's own beacon (`parallel/beacon.py`) and nothing else while all goes well:
a step costs a few writes to memory, no message and no synchronisation. A rank whose beacon has not moved for
most of the time-out puts its place and Python stack into the ranks' store, over a connection of its own. At
the time-out the first of them reports: it reads what all have put there. To blame is a rank that has put
nothing there, because it is stopped, killed or cut off; else the one that is furthest behind and not in a
collective. The ranks that wait for it are its victims: they stand further on, in a collective.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.base.json_text import parse_json
from megatron_nexus.errors import EXIT_CODE_RESTART, RestartError
from megatron_nexus.parallel.beacon import GONE, IN_STEP, Beacon, Neighbour, Phase, Place
from megatron_nexus.parallel.bounded_store import BoundedStore
from megatron_nexus.parallel.collective_failure import describe_collective_failure
from megatron_nexus.parallel.host_tree import HostTree
from megatron_nexus.parallel.rendezvous import store_prefix
from megatron_nexus.parallel.world import World

SPEAKS_AT = 0.8
"""Share of the time-out after which a rank says where it stands, so that the report has all of them."""
OF_LONGEST_STEP = 3.0
POLL_S, STORE_S, VERDICT_S, LEAVES_S, LOST_S = 1.0, 5.0, 20.0, 1.0, 3.0
STACK_FILE = "stacks_rank_{:05d}.txt"
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/pipe/p2p.py", "/megatron_nexus/parallel/")
ASLEEP_S = 10.0
"""Between two looks of a thread that looks every second: it could not run."""
BREAKS_S = 10.0
_REMEDY = f"exit code {EXIT_CODE_RESTART}: start the same command again, with --load auto"
_SHOWN_FRAMES, _SHOWN_RANKS = 12, 16


@dataclass(frozen=True)
class Report:
    """Where a rank stands: its place since when (seconds of the epoch), until when it may stay there."""

    host: str
    pid: int
    step: int
    marks: int
    phase: int
    since: float
    limit_s: float
    waits: bool
    """Whether its main thread is in a collective."""
    stack: str

    @property
    def place(self) -> Place:
        """Its place."""
        return Place(self.step, self.marks, self.phase)


class RankWatch:
    """Watches this rank; where it makes no progress it finds out, with the others, which rank is to blame."""

    def __init__(
        self,
        world: World,
        control: HostTree,
        beacon: Beacon,
        step_timeout_s: float,
        timeout_s: float,
        folder: Path,
        by_phase: bool,
    ) -> None:
        """Begin to watch; a collective call.

        `step_timeout_s` is how long a rank may stay in one place within a step (0: for ever), `timeout_s`
        elsewhere and in the first steps. Stacks are written to `folder`. `by_phase`: ranks change their
        phases at different times, as pipeline stages do, so that only their phases can be compared.
        """
        self._world, self._beacon = world, beacon
        self._step_timeout_s, self._timeout_s = step_timeout_s, timeout_s
        self._folder, self._by_phase = folder, by_phase
        self._host = socket.gethostname()
        prefix = f"{store_prefix()}/rank_watch"
        self._store = BoundedStore(world.master_addr, world.master_port, prefix, STORE_S)
        self._main = threading.main_thread().ident
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._awake_since = time.monotonic()
        self._gone_since = 0.0
        self.on_leave: Callable[[], None] = lambda: None
        """What is to be done before this process leaves, in the thread that watches."""
        mine = json.dumps([world.rank, os.getpid(), beacon.descriptor])
        near = [Neighbour(*parse_json(text)) for text in control.gather_str_on_host(mine)]
        # Those in a container of their own cannot be seen.
        self._near = {n.rank: n for n in near if n.rank != world.rank and n.read() is not None}
        self._hosts = control.all_gather_str(self._host if world.local_rank == 0 else "")
        if step_timeout_s:
            threading.Thread(target=self._watch, daemon=True, name="rank watch").start()

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Raise RestartError, which names the rank that is gone, where a collective of the block fails."""
        try:
            yield
        except RuntimeError as error:
            description = describe_collective_failure(error, self._world.rank)
            if not description:
                raise
            raise RestartError(self._name_lost(description)) from error

    # The thread.

    def end(self) -> None:
        """Stop watching: the run is over, and ranks leave one after the other."""
        self._ended.set()

    def _watch(self) -> None:
        spoken: Place | None = None
        polled = time.monotonic()
        while not self._ended.wait(min(POLL_S, self._step_timeout_s / 10)):
            if time.monotonic() - polled > ASLEEP_S:  # all of the job was stopped, and goes on
                self._awake_since = time.monotonic()
            polled = time.monotonic()
            place, age_s = self._read()
            try:
                if spoken and place != spoken:
                    spoken = None
                    self._store.delete(self._key(self._world.rank))
                if spoken is None and age_s > SPEAKS_AT * self._step_timeout_s:
                    spoken = place
                    self._speak(place, age_s)
                    self._beacon.leaving = self._withdraw
                self._look_around(place)
                if age_s > self._limit_s(place):
                    self._report(place)
            except RuntimeError:
                # Rank 0 serves the store, or the launcher does.
                if age_s > self._limit_s(place):
                    self._leave_without_store(place)
            polled = time.monotonic()  # it may have waited for a report

    def _read(self) -> tuple[Place, float]:
        """Return where this rank is, and for how long it has been there while it could run."""
        place, age_s = self._beacon.read()
        return place, min(age_s, time.monotonic() - self._awake_since)

    def _look_around(self, place: Place) -> None:
        """Tell all ranks of one of this machine that is gone. Raises RuntimeError without a store."""
        said = self._gone()
        if not said:
            return
        if not self._gone_since:
            self._gone_since = time.monotonic()
            self._store.set("gone", said)
        elif time.monotonic() - self._gone_since > BREAKS_S:
            # gloo has broken the connections long ago; NCCL may wait for ever.
            self._leaving.set()
            if self._store.add("reporter", 1) == 1:
                log.error(f"{said}; rank {self._world.rank} on {self._host} waits in {place}; {_REMEDY}")
            self._leave()

    def _limit_s(self, place: Place) -> float:
        """Return how long this rank may stay in a place."""
        if self._is_in_step(place):
            return max(self._step_timeout_s, OF_LONGEST_STEP * self._beacon.longest_step_s)
        return self._timeout_s

    def _is_in_step(self, place: Place) -> bool:
        return place.phase in IN_STEP and self._beacon.is_warm

    def _speak(self, place: Place, age_s: float) -> None:
        """Put into the store where this rank stands. Raises RuntimeError without a store."""
        frames = traceback.extract_stack(sys._current_frames().get(self._main or 0))
        waits = any(part in frame.filename for frame in frames[-4:] for part in _COLLECTIVES)
        report = Report(
            self._host,
            os.getpid(),
            *(place.step, place.marks, place.phase),
            since=time.time() - age_s,
            limit_s=self._limit_s(place),
            waits=waits or place.phase in (Phase.LOSS, Phase.TIMES),
            stack="".join(traceback.format_list(frames[-_SHOWN_FRAMES:])),
        )
        self._store.set(self._key(self._world.rank), json.dumps(asdict(report)))

    def _withdraw(self) -> None:
        """Take back what this rank has said, before it goes on: it may hang before its thread looks again."""
        with suppress(RuntimeError):
            self._store.delete(self._key(self._world.rank))

    def _report(self, place: Place) -> None:
        """Report, or wait for the report of another and leave. Raises RuntimeError without a store."""
        store = self._store
        if store.add("reporter", 1) > 1:
            deadline = time.monotonic() + VERDICT_S
            while time.monotonic() < deadline and self._beacon.read()[0] == place:
                if store.has("verdict"):
                    self._leave()
                if not store.has("reporter"):
                    return
                time.sleep(0.2)
            store.delete("reporter")  # which is lost, too: another one reports
            return
        reports = self._reports()
        lost = [rank for rank in range(self._world.size) if rank not in reports]
        behind = [] if lost else self._furthest_behind(reports)
        if any(time.time() - reports[rank].since <= reports[rank].limit_s for rank in behind):
            store.delete("reporter")  # a long evaluation, or a save: it says so when its time is up
            return
        self._leaving.set()
        log.error(self._verdict(place, reports, lost or behind))
        store.set("verdict", "leave")
        self._leave()

    def _reports(self) -> dict[int, Report]:
        """Return what ranks whose process runs have put into the store. Raises RuntimeError without one."""
        store = self._store
        dead = [rank for rank, near in self._near.items() if near.state]
        spoken = [r for r in range(self._world.size) if r not in dead and store.has(self._key(r))]
        return {rank: Report(**parse_json(store.get(self._key(rank)))) for rank in spoken}

    def _furthest_behind(self, reports: dict[int, Report]) -> list[int]:
        """Return the ranks to blame where all have spoken; all of them where none is behind."""

        def order(report: Report) -> tuple[int, bool, int]:
            return report.step, report.waits, report.phase if self._by_phase else report.marks

        last = min(map(order, reports.values()))
        return [rank for rank, report in reports.items() if order(report) == last]

    def _verdict(self, place: Place, reports: dict[int, Report], blamed: Sequence[int]) -> str:
        """Return what hangs, where the others stand, and what to do; this rank is in `place`."""
        if len(blamed) == self._world.size:
            said = f"all ranks wait for one another in {reports[blamed[0]].place}: a link or a switch fails"
        else:
            said = "; ".join(self._describe_all(blamed, reports))
        victims = [rank for rank in reports if rank not in blamed]
        lines = [
            f"{self._no_progress(place)}: {said}",
            *(f"{reports[rank].place}: rank {rank} waits" for rank in victims[:_SHOWN_RANKS]),
        ]
        for rank in [*[rank for rank in blamed if rank in reports][:1], *victims[:1]]:
            lines += [f"Python stack of rank {rank}:", reports[rank].stack.rstrip()]
        lines.append(
            f"stacks of all threads of the living ranks: {self._folder / 'stacks_rank_*.txt'}; {_REMEDY}"
        )
        return "\n".join(lines)

    def _no_progress(self, place: Place) -> str:
        """Return how long this rank has waited in a place, and by which flag."""
        slow = "--distributed-timeout-minutes; raise it where that is only slow"
        flag = "--rank-heartbeat-timeout" if self._is_in_step(place) else slow
        return f"no progress for {self._limit_s(place):.0f} s ({flag})"

    def _describe_all(self, blamed: Sequence[int], reports: dict[int, Report]) -> Iterator[str]:
        """Yield what is known of the ranks to blame, those of other machines that say nothing by machine."""
        far: dict[str, list[int]] = {}
        for rank in blamed:
            if rank in reports or rank in self._near:
                yield self._describe(rank, reports)
            else:
                far.setdefault(self._host_of(rank), []).append(rank)
        for host, ranks in far.items():
            who = f"{len(ranks)} ranks of {host}, from {ranks[0]} on, do"
            if len(ranks) == 1:
                who = f"rank {ranks[0]} of {host} does"
            yield f"{who} not answer: stopped, killed or cut off"

    def _describe(self, rank: int, reports: dict[int, Report]) -> str:
        """Return what is known of a rank that has spoken, or is of this machine."""
        if rank in reports:
            report = reports[rank]
            return (
                f"rank {rank} on {report.host} (process {report.pid}) is alive, in {report.place} "
                f"for {time.time() - report.since:.0f} s"
            )
        near = self._near[rank]
        seen = near.read()
        where = f", last seen in {seen[0]} {seen[1]:.0f} s ago" if seen else ""
        state = near.state or "it does not answer: a call holds its interpreter"
        return f"rank {rank} on {self._host} (process {near.pid}){where}: {state}"

    def _leave_without_store(self, place: Place) -> None:
        """Leave where rank 0, which serves the store, does not answer; one rank of each machine says so."""
        self._leaving.set()
        living = [near.rank for near in self._near.values() if not near.state]
        if all(self._world.rank < rank for rank in living):
            near = 0 in self._near
            log.error(
                f"{self._no_progress(place)}: "
                f"{self._describe(0, {}) if near else f'rank 0 of {self._host_of(0)} does not answer'}"
                f"; rank {self._world.rank} waits in {place}; {_REMEDY}"
            )
        self._leave()

    def _leave(self) -> None:
        """Write the stacks of this process and end it."""
        self._leaving.set()
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / STACK_FILE.format(self._world.rank)).open("w") as file:
                faulthandler.dump_traceback(file)
        self.on_leave()
        # The others write theirs while connections are whole, and ask the store, which may be rank 0's.
        time.sleep(LOST_S if self._world.rank == 0 else LEAVES_S)
        sys.stdout.flush()
        os._exit(EXIT_CODE_RESTART)

    # What both need.

    def _name_lost(self, description: str) -> str:
        """Return `description`, and which rank is gone where one of its machine has said so."""
        named, deadline = "", time.monotonic() + LOST_S
        with suppress(RuntimeError):
            store = self._store
            while not named and time.monotonic() < deadline:
                if self._leaving.is_set() or store.has("verdict"):
                    time.sleep(VERDICT_S)  # the thread ends this process
                named = self._gone() or (store.get("gone") if store.has("gone") else "")
                if not named:
                    time.sleep(0.1)
        where = f"in {self._beacon.read()[0]}, {description}; {_REMEDY}"
        return f"{named}; {where}" if named else where

    def _gone(self) -> str:
        """Return what is known of the ranks of this machine that are gone; "" where none is."""
        gone = [rank for rank, near in self._near.items() if near.state == GONE]
        return "; ".join(self._describe(rank, {}) for rank in gone)

    def _host_of(self, rank: int) -> str:
        """Return the host of a rank: that of the first rank on its machine."""
        return next((host for host in reversed(self._hosts[: rank + 1]) if host), "an unknown host")

    def _key(self, rank: int) -> str:
        return f"place/{rank}"
