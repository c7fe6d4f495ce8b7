"""Run a program as the ranks of a world on this machine, forked from this process, whose imports are done.

    warm_launcher.py COUNT PORT SCRIPT [FLAGS]

Where a rank fails, the others get a few seconds to say what they know, then they are killed.
"""

import os
import runpy
import signal
import sys
import time

from megatron_nexus.parallel.local_ranks import die_with_parent
from megatron_nexus.parallel.world import LAUNCHER

PEERS_PATIENCE_S = 6.0


def main() -> None:
    """Fork the ranks and exit with the code of the first that fails."""
    count, port, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.environ |= {LAUNCHER: "local", "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = {}
    for rank in range(count):
        pid = os.fork()
        if not pid:
            die_with_parent()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv, sys.orig_argv = words, [sys.executable, *words]
            runpy.run_path(words[0], run_name="__main__")
            return
        ranks[pid] = rank
    failed, deadline = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del ranks[pid]
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code, time.monotonic() + PEERS_PATIENCE_S
        else:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
    sys.exit(failed if failed >= 0 else 128 - failed)


if __name__ == "__main__":
    main()
