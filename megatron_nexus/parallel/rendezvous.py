"""Rendezvous: all ranks come to the store that rank 0 serves; those that were refused come to say so.

A launcher such as deepspeed or torchrun ends the ranks of its own machine. Those of other machines would wait
for a rank that was refused, as for a file that only one machine lacks, until --distributed-timeout-minutes.
Where rank 0's port is taken it says so at one of the next ports, at which the others look while they wait.
"""

import os
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megatron_nexus.errors import ConfigError, RefusedError
from megatron_nexus.parallel.world import World

REFUSED_WAITS_S = 60.0
"""How long the others may take to come, where a rank was refused."""
POLL_S, LEAVES_S = 0.01, 1.0
LOOKS_S, ANSWERS_S = 10.0, 3.0
"""How often a rank that waits looks at the next ports, and how long one of them may take to answer."""
NEXT_PORTS = (1, 2, 3)
_ANOTHER_PORT = "choose another port (deepspeed --master_port, or MASTER_PORT)"
_ENDS_ALL_RANKS = ("local", "srun", "mpirun")
"""Launchers that end the ranks of all machines when one fails, srun by --kill-on-bad-exit."""
_CAME, _REFUSED, _START = "rendezvous/came", "rendezvous/refused", "rendezvous/start"


def connect(world: World, timeout: timedelta) -> PrefixStore:
    """Return the ranks' store once all ranks have come; under torchrun the launcher serves it.

    Raises ConfigError where the ranks do not find each other, RefusedError where another rank was refused.
    """
    if _ends_together(world) or world.rank == 0 or world.local_rank:
        return _connect(world, timeout)
    found: Future[PrefixStore] = Future()

    def look_for() -> None:
        try:
            found.set_result(_connect(world, timeout))
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            found.set_exception(error)

    # torch waits for ever for a program that takes the connection and is no store.
    threading.Thread(target=look_for, daemon=True).start()
    while True:
        with suppress(TimeoutError):
            return found.result(LOOKS_S)
        _look_elsewhere(world)


def _connect(world: World, timeout: timedelta) -> PrefixStore:
    try:
        store = _store(world, timeout)
    except ConfigError as error:
        if _serves(world):
            _say_elsewhere(world, "; ".join(error.problems))
        raise
    try:
        said = _meet(world, store, "", timeout)
    except RuntimeError as error:
        raise _not_met(world, error) from error
    if said:
        raise RefusedError(said)
    return store


def refuse(world: World, message: str) -> None:
    """Tell the ranks of other machines that this one was refused; return when all of them have come.

    Nothing is said where all ranks are on this machine, or have a launcher that ends them all.
    """
    if _ends_together(world):
        return
    timeout = timedelta(seconds=REFUSED_WAITS_S)
    refusal = f"rank {world.rank} on {socket.gethostname()} was refused: {message}"
    with suppress(ConfigError, RuntimeError):
        _meet(world, _store(world, timeout), refusal, timeout)


def store_prefix() -> str:
    """Return what names in the store begin with: that of torchrun outlives a restart."""
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _ends_together(world: World) -> bool:
    """Return whether the launcher ends all ranks when one fails."""
    return world.size == world.local_size or world.launcher in _ENDS_ALL_RANKS


def _serves(world: World) -> bool:
    return world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _store(world: World, timeout: timedelta) -> PrefixStore:
    try:
        store = TCPStore(
            world.master_addr,
            world.master_port,
            world.size,
            _serves(world),
            timeout,
            wait_for_workers=False,
            master_listen_fd=world.listener,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _not_met(world, error) from error
    return PrefixStore(store_prefix(), store)


def _meet(world: World, store: PrefixStore, refusal: str, timeout: timedelta) -> str:
    """Return, once all ranks have come, what one that was refused has said, or "".

    Raises RuntimeError where ranks do not come, or those of another run do.
    """
    if refusal:
        store.set(_REFUSED, refusal)
    if (came := store.add(_CAME, 1)) > world.size:
        raise RuntimeError(f"{came} ranks are there, of a run of {world.size}: another run uses this port")
    if world.rank == 0:
        store.set(_START, _await_all(world, store, timeout))
    said = store.get(_START).decode()
    if said and world.rank == 0:
        time.sleep(LEAVES_S)  # the others read it in this process
    return said


def _say_elsewhere(world: World, message: str) -> None:
    """Say on rank 0, whose port is taken, to the other machines that it was refused, until they know it."""
    if _ends_together(world):
        return
    refusal = f"{_greeting(world)}rank {world.rank} on {socket.gethostname()} was refused: {message}".encode()
    family, both = (socket.AF_INET6, True) if socket.has_dualstack_ipv6() else (socket.AF_INET, False)
    for step in NEXT_PORTS:
        address = ("", world.master_port + step)
        with suppress(OSError), socket.create_server(address, family=family, dualstack_ipv6=both) as server:
            server.settimeout(LEAVES_S)
            deadline, machines = time.monotonic() + REFUSED_WAITS_S, -(-world.size // world.local_size) - 1
            while machines and time.monotonic() < deadline:
                with suppress(OSError):
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(refusal)
                    machines -= 1
            return


def _look_elsewhere(world: World) -> None:
    """Raise RefusedError where rank 0 says at one of the next ports that its own is taken."""
    for step in NEXT_PORTS:
        address = (world.master_addr, world.master_port + step)
        with suppress(OSError), socket.create_connection(address, ANSWERS_S) as peer:
            with peer.makefile("rb") as file:
                said = file.read().decode(errors="replace")
            if said.startswith(_greeting(world)):
                raise RefusedError(said.removeprefix(_greeting(world)))


def _greeting(world: World) -> str:
    return f"megatron_nexus, instead of {world.master_addr}:{world.master_port}: "


def _await_all(world: World, store: PrefixStore, timeout: timedelta) -> str:
    """Wait on rank 0 until all ranks have come; once one was refused, REFUSED_WAITS_S more at most."""
    began = time.monotonic()
    deadline, said = began + timeout.total_seconds(), ""
    while (came := store.add(_CAME, 0)) < world.size and time.monotonic() < deadline:
        if not said and store.check([_REFUSED]):
            said = store.get(_REFUSED).decode()
            deadline = min(deadline, time.monotonic() + REFUSED_WAITS_S)
        time.sleep(POLL_S)
    if not said and store.check([_REFUSED]):
        said = store.get(_REFUSED).decode()
    if came < world.size and not said:
        raise RuntimeError(f"{came} of {world.size} ranks have come within {timeout.total_seconds():.0f} s")
    return said


def _not_met(world: World, error: RuntimeError) -> ConfigError:
    serves = _serves(world)
    remedy = _ANOTHER_PORT if serves or "another run" in str(error) else "is rank 0 up?"
    if "ranks have come" in str(error):
        remedy = "look at why the others do not start, or raise --distributed-timeout-minutes"
    reason = str(error).splitlines()[0]
    return ConfigError(f"rank {world.rank}: {world.master_addr}:{world.master_port}: {reason}: {remedy}")
