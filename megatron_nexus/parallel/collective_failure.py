"""Collective failure: what an exception of gloo, NCCL or their store means, with a remedy.

Their texts name lines of C++ and leave out what to do. Imports no torch.
"""

import os
import re
import socket
from itertools import pairwise

TRACE_PREFIX = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where NCCL's flight recorder writes: the name of newer torches, and the old one."""

_OF_COLLECTIVES = re.compile(r"gloo|nccl|TCPStore|wait timeout after", re.IGNORECASE)
_INTERFACES = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
_LOST = (
    "lost its connection to a rank that exited without an error message: look at the end of the other ranks' "
    "output, and for the out-of-memory killer in the logs of their machines"
)
_CAUSES = (  # the first that fits
    (
        "Duplicate GPU detected",
        "shares its GPU with another rank: start as many ranks on a machine as it has devices",
    ),
    (
        "out of memory",
        "has no GPU memory left for NCCL's buffers: use a smaller --micro-batch-size or more recompute",
    ),
    (
        "nable to find (interface|address)|no socket interface|No route to host|Network is unreachable|"
        "Connection refused|timed out connecting|socketStartConnect|Call to (connect|bind)",
        "cannot connect to another machine: name the interface that joins the machines in "
        f"{_INTERFACES}, and open its ports",
    ),
    (
        "Watchdog caught|Timed out waiting|wait timeout after",
        "waited in vain for another rank, which hangs, is slow or has left: see what that one does, or raise "
        "--distributed-timeout-seconds-after-init or --distributed-timeout-minutes",
    ),
    (
        "Connection (was likely )?(closed|reset)|Broken pipe|remote process exited|ncclRemoteError|"
        "communicator was aborted|gloo",
        _LOST,
    ),
    (
        "unhandled cuda error|Cuda failure",
        "has a GPU that fails: set NCCL_DEBUG=INFO, and look for Xid in the kernel's log (dmesg)",
    ),
    ("nccl|NCCL", f"cannot use NCCL: set NCCL_DEBUG=INFO for its reason, and see {_INTERFACES}"),
)


def describe_collective_failure(error: BaseException, rank: int) -> str:
    """Return one sentence on a failed collective of `rank`, with a remedy; "" for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not (
        type(error).__name__.startswith("Dist") or _OF_COLLECTIVES.search(text)
    ):
        return ""
    description = next((sentence for pattern, sentence in _CAUSES if re.search(pattern, text)), _LOST)
    prefix = next((os.environ[name] for name in TRACE_PREFIX if os.environ.get(name)), "")
    if prefix and "nccl" in text.lower():
        description += f"; after a time-out {prefix}* have the last collectives of each rank"
    return f"rank {rank} on {socket.gethostname()} {description} ({_reason(text)})"


def _reason(text: str) -> str:
    """Return the line of an error that says most: NCCL's last error, or the first without its file."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    for before, line in pairwise(lines):
        if before.startswith("Last error"):
            return line
    # gloo goes on with advice of its own.
    return re.sub(r"^\[[^\]]*\]\s*|\. This is typically caused by a remote worker.*", "", lines[0])
