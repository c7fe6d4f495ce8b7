"""How one of several ranks ends: of all that fail only the first says why, and its exit code counts."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_nexus.errors import EXIT_CODE_USER_ERROR, NexusError, path_errors
from megatron_nexus.parallel.collective_failure import describe_collective_failure
from megatron_nexus.parallel.world import World

PEER_EXIT_GRACE_S = 3.0


@contextmanager
def refusing(world: World) -> Iterator[None]:
    """End the process with code 2 where the block finds a mistake of the user, as every rank does."""
    try:
        with path_errors():
            yield
    except NexusError as error:
        # One on each machine says it.
        if world.local_rank == 0:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
        else:
            # The first to leave has its launcher end the others, perhaps before that one has spoken.
            time.sleep(PEER_EXIT_GRACE_S)
        sys.exit(EXIT_CODE_USER_ERROR)


@contextmanager
def ending_ranks(rank: int) -> Iterator[None]:
    """End this rank where the block fails in any way; of all ranks only the first to fail says why."""
    try:
        with path_errors():
            yield
    except BaseException as error:  # noqa: BLE001 - every way to fail ends here, and the process with it
        from megatron_nexus.parallel.mesh import first_failure  # with torch, which is imported by now

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_first, code = first_failure(error.exit_code if isinstance(error, NexusError) else 1)
        if is_first:
            _report(error, rank)
        else:
            # The launcher is about to end this rank; leaving first would hide the exit code that matters.
            time.sleep(PEER_EXIT_GRACE_S)
        _leave(code)


def _leave(code: int) -> NoReturn:
    # Not sys.exit: other ranks may never answer again, and the interpreter would wait for them.
    sys.stdout.flush()
    os._exit(code)


def _report(error: BaseException, rank: int) -> None:
    """Write why this rank fails to stderr."""
    if isinstance(error, NexusError):
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    elif failed := describe_collective_failure(error, rank):
        sys.stderr.write(f"{failed}\n")
    else:
        sys.stderr.write(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}")
    sys.stderr.flush()
