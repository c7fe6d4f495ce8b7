"""Loss plot: the hook that draws loss.png while a run goes on, concurrently with training."""

import threading
import time
from pathlib import Path

from megatron_nexus.log import logger
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import PLOT_FILE, StepMetrics, plot_losses

INTERVAL_S, SHARE = 60.0, 0.01
"""How often it is drawn, and the share of the time that may go into it: a long curve is drawn less often."""


class LossPlot(Hook):
    """Draws the curve every minute, on the rank that writes the metrics; the end of a run draws it whole."""

    def __init__(self, run_dir: Path, unigram_entropy: float | None, title: str) -> None:
        """The arguments are those of `plot_losses`."""
        self._run_dir, self._entropy, self._title = run_dir, unigram_entropy, title
        self._due = time.monotonic() + INTERVAL_S
        self._drawing: threading.Thread | None = None

    def after_step(self, metrics: StepMetrics) -> None:
        if time.monotonic() > self._due and (self._drawing is None or not self._drawing.is_alive()):
            self._drawing = threading.Thread(target=self._draw, daemon=True, name="loss plot")
            self._drawing.start()

    def on_end(self) -> None:
        if self._drawing is not None:
            self._drawing.join()

    def _draw(self) -> None:
        began = time.monotonic()
        try:
            plot_losses(self._run_dir, self._entropy, self._title)
        except Exception as error:  # noqa: BLE001 - no run ends for it
            logger.warning("%s is not drawn: %s: %s", PLOT_FILE, type(error).__name__, error)
        now = time.monotonic()
        self._due = now + max(INTERVAL_S, (now - began) / SHARE)
