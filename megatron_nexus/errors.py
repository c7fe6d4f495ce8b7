"""The errors a user can mend: each message names the value, the rule it breaks and the remedy.

The command lines print them without a traceback and exit with code 2. A broken invariant of our own
is an `assert`, never one of these.
"""

EXIT_CODE_USER_ERROR = 2


class NexusError(Exception):
    """Base of every error that the user can mend."""


class ConfigError(NexusError):
    """The configuration contradicts itself, the machine or the world size.

    All problems are reported at once: one per line, each with its remedy.
    """

    def __init__(self, problems: list[str]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = list(problems)
        count = len(problems)
        head = f"{count} problem{'s' if count > 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in problems)]))


class DataError(NexusError):
    """A corpus, an index or a tokenizer cannot be used as it is."""


class CheckpointError(NexusError):
    """A checkpoint is missing, incomplete, damaged or of another model."""


class TrainingError(NexusError):
    """Training cannot go on: a loss or a gradient is no longer finite, or another rank has failed."""
