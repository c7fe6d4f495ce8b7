"""How a tool ends: a mistake of the user is one message and exit code 2, Ctrl-C is exit code 130.

And what comes next: the command that trains on.
"""

import gc
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import training_sources
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, NexusError, path_errors
from megatron_nexus.log import logger, silence

EXIT_CODE_INTERRUPTED = 130


def run_tool(tool: Callable[[], None]) -> NoReturn:
    """Run a tool and end the process."""
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
        silence(sys.stdout)  # the interpreter would complain of it at exit
    sys.exit(0)


def pretrain_command(*flags: str, ranks: int = 1) -> str:
    """The line that trains with `flags`, spelt as this tool was started: by a file or as a command."""
    if sys.argv[0].endswith(".py"):
        script = os.path.normpath(Path(sys.argv[0]) / "../../pretrain_nexus.py")
        launch = ["deepspeed", *(["--num_gpus", str(ranks)] if ranks > 1 else []), script]
    else:
        launch = ["nexus-pretrain"]
    return shlex.join([*launch, *flags])


def tell_next(command: str, config: RunConfig, knows_tokenizer: bool) -> None:
    """Tell the command that continues from a checkpoint, and what it needs where no tokens are known."""
    if knows_tokenizer or training_sources(config.data) or config.data.tokenizer_model:
        logger.info("  continue with  %s", command)
    else:
        logger.info(
            "to continue, add the tokenizer of the model (--tokenizer-model) or token files of it "
            "(--data-path) to  %s",
            command,
        )


def end_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, so that what is half written is cleared away."""
    signal.signal(signal.SIGTERM, _interrupted)


def _interrupted(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
