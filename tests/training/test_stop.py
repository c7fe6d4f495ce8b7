"""Every signal that asks a run to stop is remembered; what nohup has a process ignore stays ignored."""

import signal
from collections.abc import Iterator

import pytest

from megatron_nexus.config.exit_signals import DEFAULT_EXIT_SIGNALS, parse_exit_signals
from megatron_nexus.errors import ConfigError
from megatron_nexus.training.faults import StopRequest

SIGNALS = parse_exit_signals(DEFAULT_EXIT_SIGNALS)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers are those of before, whatever a test installs."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # as in a terminal, wherever the tests run
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_of_a_terminal_or_a_scheduler_asks_the_run_to_stop(number: signal.Signals) -> None:
    stop = StopRequest(SIGNALS)
    assert stop.signal_name == ""
    signal.raise_signal(number)
    assert stop.signal_name == number.name


def test_only_the_signals_that_were_named_are_heeded() -> None:
    stop = StopRequest(parse_exit_signals(["USR2"]))
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    signal.raise_signal(signal.SIGUSR2)
    assert stop.signal_name == "SIGUSR2"


def test_under_nohup_the_end_of_the_terminal_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(SIGNALS)
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal_name == ""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["SIGFOO"], "--exit-signal SIGFOO is not a signal: use names such as SIGTERM"),
        (["12"], "--exit-signal 12 is not a signal"),
        (["SIGKILL"], "--exit-signal SIGKILL cannot ask a run to save and exit"),
        (["SIGSEGV", "CHLD"], "CHLD cannot ask"),
        ([], "--exit-signal names no signal"),
    ],
)
def test_what_cannot_ask_a_run_to_stop_is_refused(names: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_exit_signals(names)
