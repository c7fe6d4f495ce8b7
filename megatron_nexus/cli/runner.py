"""How a verb ends: a mistake of the user is one message and exit code 2, Ctrl-C or SIGTERM exit code 130."""

import gc
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_nexus import log
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, NexusError, path_errors

EXIT_CODE_INTERRUPTED = 130


def run_tool(tool: Callable[[], None]) -> NoReturn:
    """Run a tool, whose messages go to stdout, and end the process."""
    log.configure(is_main_rank=True)
    # As Ctrl-C: half-written output is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The 700 of Python are for small programs: a third of the time to import torch goes into collections.
    gc.set_threshold(100_000)
    try:
        with path_errors():
            tool()
    except NexusError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(EXIT_CODE_USER_ERROR)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(": ".join(["interrupted", *map(str, interrupt.args)]) + "\n")
        sys.exit(EXIT_CODE_INTERRUPTED)
    except BrokenPipeError:
        log.silence(sys.stdout)  # the interpreter would complain of it at exit
    sys.exit(0)
