"""Worker processes: forked off a server that has imported what they need.

The server starts while the command is still importing, and the number of workers costs nothing. They are not
forked off the command itself, whose MPI and threads would not survive it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import wait

SAFE_PATH = "PYTHONSAFEPATH"
IMPORTED = ["megatron_nexus.data.shards"]


def start_server() -> None:
    """Start the server, or do nothing where it runs; does not wait for its imports."""
    forkserver.set_forkserver_preload(IMPORTED)
    # Or what lies in the working directory could be imported in the place of what is installed.
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:  # for the server alone
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def start_workers(count: int) -> ProcessPoolExecutor:
    """A pool of processes that leave Ctrl-C to this one and end with it, even by SIGKILL."""
    start_server()
    return ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("forkserver"), initializer=_start_worker
    )


def end_workers(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool without waiting for what they do."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker makes threads for all cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by multiprocessing"
    with contextlib.suppress(OSError):
        wait([parent.sentinel])
    os._exit(1)
