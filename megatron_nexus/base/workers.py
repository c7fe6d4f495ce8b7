"""Worker processes: a pool whose processes leave Ctrl-C to their parent and end with it, even by SIGKILL.

fork         at once, with all that the parent has imported; not with MPI or threads that hold locks
forkserver   forked off a server that starts early and imports what they need while the parent starts
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import Literal

SAFE_PATH = "PYTHONSAFEPATH"


def start_server(module: str) -> None:
    """Start the fork server, which imports `module`, or do nothing if it runs; does not wait for it."""
    forkserver.set_forkserver_preload([module])
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


@contextlib.contextmanager
def worker_pool(count: int, method: Literal["fork", "forkserver"]) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of `count` processes; at the end of the block they are ended, whatever they do."""
    context = multiprocessing.get_context(method)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or each worker makes threads for all cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by multiprocessing"
    with contextlib.suppress(OSError):
        wait([parent.sentinel])
    os._exit(1)
