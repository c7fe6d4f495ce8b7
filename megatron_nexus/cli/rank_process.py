"""The process of a rank, for the verbs that start ranks: how it imports torch and how it ends."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_nexus import log
from megatron_nexus.base.imports import gc_paused, hidden_modules
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, NexusError, RefusedError, path_errors
from megatron_nexus.parallel.collective_failure import describe_collective_failure
from megatron_nexus.parallel.world import World

PEER_EXIT_GRACE_S = 3.0


@contextmanager
def importing_torch() -> Iterator[None]:
    """Import torch, then what the body imports, as fast as possible and without messages of either."""
    # A rank that loses a peer says so itself; c10d would add the frames of its C++ stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with log.Progress("importing torch and DeepSpeed"), gc_paused(), hidden_modules("mlflow"):
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns, on each rank
        import torch._dynamo  # which torch itself does at the first optimizer

        yield


def run_rank(task: Callable[[], None], world: World) -> NoReturn:
    """Run `task` and end the process: of all ranks that fail, only the first says why."""
    try:
        with path_errors():
            task()
    except BaseException as error:  # noqa: BLE001 - every way to fail ends here, and the process with it
        end_failed_rank(error, world)
    # Libraries finish at exit what they hold, as the wandb monitor of DeepSpeed does.
    sys.exit(0)


def end_refused_rank(error: NexusError, world: World | None) -> NoReturn:
    """End the process of a rank that has found a mistake of the user before torch is imported.

    `world` None: it could not be read. Every rank finds the same, and one on each machine says it. Ranks of
    other machines, which may find nothing wrong, are informed that this one was refused.
    """
    if world is None or world.local_rank == 0:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    else:
        # The first to leave has its launcher end the others, perhaps before that one has spoken.
        time.sleep(PEER_EXIT_GRACE_S)
    if world is not None and world.size > world.local_size:
        with gc_paused():
            from megatron_nexus.parallel.rendezvous import refuse
        refuse(world, str(error))
    sys.exit(EXIT_CODE_USER_ERROR)


def end_failed_rank(error: BaseException, world: World) -> NoReturn:
    """End the process of a rank that has failed, which says why if it is the first of all to fail."""
    from megatron_nexus.parallel.mesh import first_failure

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    is_first, code = first_failure(error.exit_code if isinstance(error, NexusError) else 1)
    # srun ends the others when one has left, and gives the highest code of all: 143 would hide this one.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    if isinstance(error, RefusedError) and world.local_rank:
        is_first = False  # one on each machine says it
    if is_first:
        _report(error, world.rank)
    else:
        # The launcher is about to end this rank; leaving first would hide the exit code that matters.
        time.sleep(PEER_EXIT_GRACE_S)
    # Not sys.exit: other ranks may never answer again, and the interpreter would wait for them.
    sys.stdout.flush()
    os._exit(code)


def _report(error: BaseException, rank: int) -> None:
    if isinstance(error, NexusError):
        log.error(f"{type(error).__name__}: {error}")
    elif failed := describe_collective_failure(error, rank):
        log.error(failed)
    else:
        log.error(f"rank {rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
