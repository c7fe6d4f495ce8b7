"""Rendezvous: all ranks come to the store that rank 0 serves; those that were refused come to say so.

A launcher such as deepspeed or torchrun ends the ranks of its own machine. Those of other machines would wait
for a rank that was refused, as for a file that only one machine lacks, until --distributed-timeout-minutes.
"""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megatron_nexus.errors import ConfigError, RefusedError
from megatron_nexus.parallel.world import World

REFUSED_WAITS_S = 60.0
"""How long the others may take to come, where a rank was refused."""
POLL_S, LEAVES_S = 0.01, 1.0
_ENDS_ALL_RANKS = ("local", "srun", "mpirun")
"""Launchers that end the ranks of all machines when one fails, srun by --kill-on-bad-exit."""
_CAME, _REFUSED, _START = "rendezvous/came", "rendezvous/refused", "rendezvous/start"


def connect(world: World, timeout: timedelta) -> PrefixStore:
    """Return the ranks' store once all ranks have come; under torchrun the launcher serves it.

    Raises ConfigError where the ranks do not find each other, RefusedError where another rank was refused.
    """
    store = _store(world, timeout)
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
    if world.size == world.local_size or world.launcher in _ENDS_ALL_RANKS:
        return
    timeout = timedelta(seconds=REFUSED_WAITS_S)
    refusal = f"rank {world.rank} on {socket.gethostname()} was refused: {message}"
    with suppress(ConfigError, RuntimeError):
        _meet(world, _store(world, timeout), refusal, timeout)


def store_prefix() -> str:
    """Return what names in the store begin with: that of torchrun outlives a restart."""
    return f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


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

    Raises RuntimeError where ranks do not come.
    """
    if refusal:
        store.set(_REFUSED, refusal)
    store.add(_CAME, 1)
    if world.rank == 0:
        store.set(_START, _await_all(world, store, timeout))
    said = store.get(_START).decode()
    if said and world.rank == 0:
        time.sleep(LEAVES_S)  # the others read it in this process
    return said


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
    remedy = "choose another port (deepspeed --master_port, or MASTER_PORT)" if serves else "is rank 0 up?"
    if "ranks have come" in str(error):
        remedy = "look at why the others do not start, or raise --distributed-timeout-minutes"
    reason = str(error).splitlines()[0]
    return ConfigError([f"rank {world.rank}: {world.master_addr}:{world.master_port}: {reason}: {remedy}"])
