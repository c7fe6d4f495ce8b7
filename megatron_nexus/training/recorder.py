"""MetricsRecorder: the hook that writes a run's metrics, and every so often a line on the console."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.loggers import open_loggers
from megatron_nexus.training.metrics import Evaluation, MetricsWriter, StepMetrics
from megatron_nexus.training.run_times import record_lost_steps

SILENCE_S = 5.0
"""The console shows a step at least so often, whatever --log-interval says."""
RECENT_STEPS, FEWEST_STEPS = 64, 3


class TimeLeft:
    """Predicts how long a run will take to its last token, from its recent steps and what is between steps.

    By the median time a token, which is not moved by a step that waited for a disk. The time between steps
    (evaluations, saves) is taken to stay the share that it has been since the first step, which is left out:
    it compiles.
    """

    def __init__(self, last_tokens: int) -> None:
        """`last_tokens` is what the run will have read at its end."""
        self._last_tokens = last_tokens
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._steps_s = 0.0
        self._began: float | None = None

    def seconds(self, metrics: StepMetrics) -> float | None:
        """Count a step, and return the seconds that are left after it; None while too few are known."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return None
        self._recent.append(1.0 / metrics.tokens_per_s)
        self._steps_s += metrics.step_s
        if len(self._recent) < FEWEST_STEPS:
            return None
        overhead = max(1.0, (now - self._began) / self._steps_s) if self._steps_s else 1.0
        return median(self._recent) * max(0, self._last_tokens - metrics.tokens) * overhead


class MetricsRecorder(Hook):
    """Writes to metrics.jsonl, the loggers and the console, on the rank that `writes`."""

    def __init__(
        self,
        config: RunConfig,
        writes: bool,
        run_dir: Path,
        resumed_step: int,
        last_tokens: int,
        write_monitors: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        """`last_tokens` the run will have read at its end; `write_monitors` hands values to DeepSpeed's.

        Raises ConfigError where a logger cannot begin.
        """
        self._writer = None
        if writes:
            name = "unlearning loss" if config.unlearning.is_on else "lm loss"
            loggers = open_loggers(config, run_dir, resumed_step, write_monitors)
            self._writer = MetricsWriter(run_dir, resumed_step, loggers, name)
            record_lost_steps(run_dir, self._writer.dropped)
        self._run_dir = run_dir
        self._interval = config.logging.log_interval
        self._train_iters = config.training.train_iters
        self._last_log_s = 0.0
        self._time_left = TimeLeft(last_tokens)

    def after_step(self, metrics: StepMetrics) -> None:
        if self._writer is None:
            return
        due = metrics.step % self._interval == 0 or metrics.step == self._train_iters
        to_console = due or time.monotonic() - self._last_log_s > SILENCE_S
        left_s = self._time_left.seconds(metrics)
        self._writer.step(metrics, self._train_iters, to_console, left_s)
        if to_console:
            self._last_log_s = time.monotonic()

    def after_evaluation(self, found: Evaluation) -> None:
        if self._writer is not None:
            self._writer.evaluation(found)

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        if self._writer is not None:
            self._writer.rewind(step, record)
            record_lost_steps(self._run_dir, self._writer.dropped)

    def on_failure(self, error: BaseException | None = None) -> None:
        if self._writer is not None:
            self._writer.close(failed=True)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()


def finish_loggers(hooks: Sequence[Hook]) -> None:
    """Mark the run as failed, from another thread than the run's, which hangs."""
    for hook in hooks:
        if isinstance(hook, MetricsRecorder):
            hook.on_failure()
