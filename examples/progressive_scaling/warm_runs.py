"""`nexus train` in processes that need not import torch and DeepSpeed first: 6 seconds less for each run.

This process imports them once, computes nothing with them, and forks. Only on machines of CPUs: after a fork
CUDA cannot be used. To the run its process is like any other.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def train_warm(argv: Sequence[str], log: Path) -> int:
    """Run `nexus train` with the flags `argv`, its output in `log`, and return its exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches, and warns
    import matplotlib.figure  # noqa: F401 - the runs' imports, once for all
    import torch._dynamo  # noqa: F401

    import megatron_nexus.training.run  # noqa: F401

    process = multiprocessing.get_context("fork").Process(target=_train, args=(list(argv), log))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()  # it saves, and ends
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode


def _train(argv: list[str], log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent passes on what it means
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from megatron_nexus.cli.main import main

    sys.argv = ["nexus", "train", *argv]
    main()
