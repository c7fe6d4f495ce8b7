"""Ranks whose port is taken, by another program or another run, say so and keep no machine waiting."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from megatron_nexus.errors import ConfigError, RefusedError
from megatron_nexus.parallel import rendezvous
from megatron_nexus.parallel.rendezvous import NEXT_PORTS, connect
from megatron_nexus.parallel.world import World
from tests.support.ports import free_port

TIMEOUT = timedelta(seconds=60)


def world(rank: int, port: int, size: int = 2) -> World:
    """A rank of a launcher that ends the ranks of its own machine alone; each machine has one."""
    return World("deepspeed", rank, size, 0, 1, "127.0.0.1", port)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which a program listens that is no store and never answers; the next is taken, too."""
    with socket.socket() as first, socket.socket() as second:
        while True:
            port = free_port()
            try:
                for step, each in enumerate((first, second)):
                    each.bind(("127.0.0.1", port + step))
                    each.listen()
            except OSError:
                continue
            break
        yield port


@pytest.mark.law
def test_rank_0_whose_port_is_taken_tells_the_other_machines(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "LOOKS_S", 1.0)
    monkeypatch.setattr(rendezvous, "ANSWERS_S", 1.0)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(connect, world(1, taken), TIMEOUT)
        with pytest.raises(ConfigError, match=rf"rank 0: 127.0.0.1:{taken}: .*choose another port"):
            connect(world(0, taken), TIMEOUT)
        with pytest.raises(RefusedError, match=rf"rank 0 on \S+ was refused: rank 0: 127.0.0.1:{taken}"):
            other.result(30)
    assert len(NEXT_PORTS) > 1


def test_a_rank_that_comes_to_another_run_is_refused_there() -> None:
    port = free_port()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(connect, world(0, port), TIMEOUT)
        stores = [connect(world(1, port), TIMEOUT), first.result(30)]
        with pytest.raises(ConfigError, match=r"3 ranks are there, of a run of 2: another run uses"):
            connect(world(1, port), TIMEOUT)
    assert len(stores) == 2
