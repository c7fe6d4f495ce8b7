"""The console: one logger for the whole package, and progress lines for everything that takes time.

Only rank 0 speaks (`configure(speaks=...)`); errors are reported by the entry script. Nothing else in
the package prints.
"""

import errno
import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

logger = logging.getLogger("megatron_nexus")

HEARTBEAT_S = 5.0


def silence(stream: TextIO) -> None:
    """Send what else is written to `stream` nowhere: who read it has enough, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(logging.StreamHandler[TextIO]):
    """Writes messages, and no more of them where nobody reads: the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        # A pipe whose reader has ended, or a terminal that was closed.
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO):
            silence(self.stream)
        else:
            super().handleError(record)


def configure(speaks: bool, stream: TextIO | None = None) -> None:
    """Send the package's messages to stdout, or to `stream` where stdout is for something else.

    A process that does not speak shows warnings only.
    """
    handler = _Console(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if speaks else logging.WARNING)
    logger.propagate = False


class Progress:
    """A stage of work that reports itself: a line when it begins, one every `interval_s`, one when it ends.

    The lines in between come from a thread, so a stage that is one long foreign call (training a
    tokenizer, importing torch) is never silent either. `total` and `advance` are optional: with them the
    lines show the share done and the time left.
    """

    def __init__(
        self, stage: str, total: float | None = None, unit: str = "", interval_s: float = HEARTBEAT_S
    ) -> None:
        self.stage = stage
        self.total = total
        self.unit = unit
        self.interval_s = interval_s
        self.done = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def advance(self, amount: float) -> None:
        """Add finished work, in `unit`."""
        self.done += amount

    def _describe(self) -> str:
        elapsed_s = time.monotonic() - self._began
        if self.total is None or self.done == 0:
            return f"{elapsed_s:.0f} s"
        left_s = elapsed_s * max(0.0, self.total - self.done) / self.done
        share = f"{self.done:,.0f} of {self.total:,.0f} {self.unit}".rstrip()
        return f"{share}, {elapsed_s:.0f} s, about {left_s:.0f} s left"

    def _beat(self) -> None:
        while not self._stop.wait(self.interval_s):
            logger.info("%s ... %s", self.stage, self._describe())

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
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
        if error is None:
            logger.info("%s: done in %.1f s", self.stage, time.monotonic() - self._began)
