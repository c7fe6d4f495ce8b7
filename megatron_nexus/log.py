"""The console: one logger for the whole package, and progress lines for everything that takes time.

Only the main rank prints (`configure(is_main_rank=...)`); errors are printed by the command line. Nothing
else in the package prints.
"""

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO

logger = logging.getLogger("megatron_nexus")

HEARTBEAT_S = 5.0
QUIET_IMPORT_S = 2.0
MILLION = 1e6


def silence(stream: TextIO) -> None:
    """Discard what else is written to `stream`: its reader, such as `head`, has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(logging.StreamHandler[TextIO]):
    """Write messages until the reader ends; the work continues without them."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        # A pipe whose reader has ended, or a terminal that was closed.
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO):
            silence(self.stream)
        else:
            super().handleError(record)


def configure(is_main_rank: bool, stream: TextIO | None = None) -> None:
    """Send the package's messages to stdout, or to `stream` where stdout is for something else.

    Other ranks print warnings only.
    """
    handler = _Console(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_main_rank else logging.WARNING)
    logger.propagate = False


def also_to_file(path: Path) -> None:
    """Append the messages of this rank to a file too, with the time; also what other ranks do not print.

    Raises OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for console in logger.handlers:
        console.setLevel(logger.level)
    logger.addHandler(file)
    logger.setLevel(logging.DEBUG)


def show(lines: Iterable[str]) -> None:
    """Log lines, which the main rank alone prints."""
    for line in lines:
        logger.info("%s", line)


def error(text: str) -> None:
    """Write an error to stderr, and to the file of `also_to_file` where there is one."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
    logger.debug("%s", text)


def importing(library: str) -> "Progress":
    """Return the progress of an import, which prints nothing if it takes less than two seconds."""
    return Progress(f"importing {library}", after_s=QUIET_IMPORT_S)


class Progress:
    """A stage of work that reports itself: a line when it begins, one every `interval_s`, one when it ends.

    The lines in between come from a thread, so a stage that is one long call of a library (training a
    tokenizer, importing torch) is never silent either. `total` and `advance` are optional: with them the
    lines show the part done and the time left. Amounts of "MB" and "M tokens" are given in bytes and tokens.
    A stage that ends within `after_s` prints nothing.
    """

    def __init__(
        self,
        stage: str,
        total: float | None = None,
        unit: str = "",
        interval_s: float = HEARTBEAT_S,
        after_s: float = 0.0,
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.interval_s = interval_s
        self.after_s = after_s
        self._is_shown = not after_s
        self.done = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def advance(self, amount: float) -> None:
        """Add finished work, in `unit`, or in bytes or tokens where that counts millions."""
        self.done += amount

    def _describe(self) -> str:
        elapsed_s = time.monotonic() - self._began
        if self.total is None or self.done == 0:
            return f"{elapsed_s:.0f} s"
        left_s = elapsed_s * max(0.0, self.total - self.done) / self.done
        one = MILLION if self.unit.startswith("M") else 1
        share = f"{self.done / one:,.0f} of {self.total / one:,.0f} {self.unit}".rstrip()
        return f"{share}, {elapsed_s:.0f} s, about {left_s:.0f} s left"

    def _beat(self) -> None:
        if not self._is_shown:
            if self._stop.wait(self.after_s):
                return
            self._is_shown = True
            logger.info("%s ...", self.stage)
        while not self._stop.wait(self.interval_s):
            logger.info("%s ... %s", self.stage, self._describe())

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self._is_shown:
            logger.info("%s ...", self.stage)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None and self._is_shown:
            logger.info("%s: done in %.1f s", self.stage, time.monotonic() - self._began)
