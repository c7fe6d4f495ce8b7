"""MetricsRecorder: the hook that writes a run's metrics, and every so often a line on the console."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.loggers import open_loggers
from megatron_nexus.training.metrics import Evaluation, MetricsWriter, StepMetrics
from megatron_nexus.training.run_times import record_lost_steps
from megatron_nexus.training.time_left import TimeLeft

SILENCE_S = 5.0
"""The console shows a step at least so often, whatever --log-interval says."""


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
        """Write a step."""
        if self._writer is None:
            return
        due = metrics.step % self._interval == 0 or metrics.step == self._train_iters
        to_console = due or time.monotonic() - self._last_log_s > SILENCE_S
        left_s = self._time_left.seconds(metrics)
        self._writer.step(metrics, self._train_iters, to_console, left_s)
        if to_console:
            self._last_log_s = time.monotonic()

    def after_evaluation(self, found: Evaluation) -> None:
        """Write what was measured."""
        if self._writer is not None:
            self._writer.evaluation(found)

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        """Drop the steps after the one that the run has gone back to, and write why."""
        if self._writer is not None:
            self._writer.rewind(step, record)
            record_lost_steps(self._run_dir, self._writer.dropped)

    def on_failure(self, error: BaseException | None = None) -> None:
        """Close the files, and mark the run as failed where loggers have such a mark."""
        if self._writer is not None:
            self._writer.close(failed=True)

    def on_end(self) -> None:
        """Close the files and finish the loggers."""
        if self._writer is not None:
            self._writer.close()


def finish_loggers(hooks: Sequence[Hook]) -> None:
    """Mark the run as failed, from another thread than the run's, which hangs."""
    for hook in hooks:
        if isinstance(hook, MetricsRecorder):
            hook.on_failure()
