"""What --profile and --record-memory-history ask for: steps, ranks, and whether they can be."""

from collections.abc import Iterator

from megatron_nexus.config.files_config import LoggingConfig
from megatron_nexus.config.run_config import RunConfig


def profile_ranks(logging: LoggingConfig) -> tuple[int, ...]:
    """Return the ranks of --profile-ranks. Raises ValueError where a word is not a number."""
    return tuple(map(int, logging.profile_ranks))


def profile_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield what is wrong with the flags of profiling."""
    logging, last = config.logging, config.training.train_iters
    if not logging.profile and not logging.record_memory_history:
        return
    first, end = logging.profile_step_start, logging.profile_step_end
    if logging.profile and not first < end:
        yield (
            f"--profile-step-end {end} is the step before which profiling ends, and it begins at "
            f"--profile-step-start {first}: give more than {first}"
        )
    elif logging.profile and end > last + 1:
        yield (
            f"--profile-step-end {end}: the run ends at step {last}: give at most {last + 1}, and a "
            "--profile-step-start below it"
        )
    for word in logging.profile_ranks:
        if not word.isdecimal() or int(word) >= world_size:
            yield (
                f"--profile-ranks {word}: the world has {world_size} rank{'s' if world_size > 1 else ''}: "
                f"give numbers from 0 to {world_size - 1}"
            )
