"""Exit signals: those at which a run saves a checkpoint and exits."""

import signal
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

from megatron_nexus.errors import raise_problems

DEFAULT_EXIT_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""What terminals (Ctrl-C, a closed window) and schedulers (SLURM, submitit, LSF, Grid Engine) send."""

NO_REQUESTS = (
    *("SIGKILL", "SIGSTOP"),  # cannot be caught
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"),  # would happen again at once
    *("SIGCHLD", "SIGPIPE", "SIGWINCH", "SIGURG", "SIGCONT"),  # a child has ended, a pipe was closed, ...
)

Handler = Callable[[int, FrameType | None], None]


def parse_exit_signals(names: Sequence[str]) -> tuple[signal.Signals, ...]:
    """Return the signals of `--exit-signal`, by names such as SIGUSR2 or USR2.

    Raises ConfigError with every name that is not a signal, or not one that can ask a run to stop.
    """
    problems = [] if names else [f"--exit-signal names no signal: give such as {DEFAULT_EXIT_SIGNALS[0]}"]
    found = []
    for name in names:
        member = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
        if member is None or member.name in NO_REQUESTS:
            why = "is not a signal" if member is None else "cannot ask a run to save and exit"
            problems.append(
                f"--exit-signal {name} {why}: use names such as {', '.join(DEFAULT_EXIT_SIGNALS)}"
            )
        else:
            found.append(member)
    raise_problems(problems)
    return tuple(dict.fromkeys(found))


def handle(signals: Iterable[signal.Signals], handler: Handler) -> None:
    """Install `handler`; a signal that the process was started to ignore, as by nohup, stays ignored."""
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
