"""The global batch at each step, and how many steps a budget of samples takes: `--rampup-batch-size`.

As in Megatron-LM: the batch begins at `start` and grows by `increment` up to the full one, each size for the
same number of samples, `ramp_samples` together. Samples are counted from the start of the run, over resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nexus.errors import ConfigError

MOST_SIZES = 10_000


@dataclass(frozen=True)
class BatchSchedule:
    """Samples per optimizer step as a function of the samples consumed before it."""

    full: int
    start: int
    increment: int
    ramp_samples: int

    def size(self, consumed: int) -> int:
        """Return the global batch of the step after `consumed` samples."""
        if consumed >= self.ramp_samples or self.start >= self.full:
            return self.full
        stages = (self.full - self.start) // self.increment
        return self.start + self.increment * (consumed * stages // self.ramp_samples)

    def _stage_end(self, consumed: int) -> int | None:
        """Return the samples at which the size of the batch after `consumed` ends, or None for the last."""
        size = self.size(consumed)
        if size == self.full:
            return None
        stages = (self.full - self.start) // self.increment
        number = (size - self.start) // self.increment + 1
        return -(-number * self.ramp_samples // stages)

    def steps(self, consumed: int, samples: int) -> int:
        """Return the steps after `consumed` samples that read at least `samples` more."""
        steps, wanted = 0, consumed + samples
        while consumed < wanted:
            end = self._stage_end(consumed)
            until = wanted if end is None else min(wanted, end)
            taken = -(-(until - consumed) // self.size(consumed))
            steps, consumed = steps + taken, consumed + taken * self.size(consumed)
        return steps

    def samples(self, consumed: int, steps: int) -> int:
        """Return the samples that `steps` steps read after `consumed`."""
        first = consumed
        while steps > 0:
            size, end = self.size(consumed), self._stage_end(consumed)
            taken = steps if end is None else min(steps, -(-(end - consumed) // size))
            steps, consumed = steps - taken, consumed + taken * size
        return consumed - first


def batch_schedule(rampup: Sequence[str], full: int) -> BatchSchedule:
    """Return the schedule that `--rampup-batch-size` asks for; without words the batch is always full.

    Raises ConfigError where the words are not a ramp up to `full`.
    """
    if not rampup:
        return BatchSchedule(full, full, 1, 0)
    words = f"--rampup-batch-size {' '.join(rampup)}"
    if len(rampup) != 3 or not all(word.isascii() and word.isdigit() for word in rampup):
        raise ConfigError(f"{words} is not three whole numbers: give start, increment and samples")
    start, increment, samples = (min(int(word), 1 << 63) for word in rampup)
    if not start or not increment or start > full or (full - start) % increment:
        raise ConfigError(
            f"{words}: {start} and steps of {increment} do not reach --global-batch-size {full}: give a "
            f"start of at most {full}, and an increment that divides the rest, such as "
            f"{max(1, full - start)}"
        )
    if (full - start) // increment > MOST_SIZES:
        raise ConfigError(f"{words}: more than {MOST_SIZES:,} sizes: give a larger increment")
    return BatchSchedule(full, start, increment, samples)
