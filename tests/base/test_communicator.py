"""The barrier that carries errors: what one rank raises all raise, with the ranks and their problems."""

import threading

import pytest

from megatron_nexus.base.communicator import SingleProcess, raise_on_all_ranks
from megatron_nexus.errors import CheckpointError, ConfigError


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, messages: list[str], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(messages)
        self._messages, self._barrier = messages, barrier

    def all_gather_str(self, message: str) -> list[str]:
        self._messages[self.rank] = message
        self._barrier.wait(20)
        return list(self._messages)


def test_all_ranks_raise_what_some_have_raised() -> None:
    errors: list[Exception | None] = [
        OSError(28, "No space left on device", "a"),
        None,
        CheckpointError("damaged"),
        CheckpointError("damaged"),
        ConfigError(["--x 1", "--y 2"]),
    ]
    messages, barrier = [""] * len(errors), threading.Barrier(len(errors))
    raised: list[str] = [""] * len(errors)

    def run(rank: int) -> None:
        try:
            with raise_on_all_ranks(ThreadRanks(rank, messages, barrier), "cannot save", "make room"):
                if (error := errors[rank]) is not None:
                    raise error
        except CheckpointError as error:
            raised[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(errors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [
        "cannot save",
        "  rank 0: [Errno 28] No space left on device: 'a'",
        "  rank 2, 3: damaged",
        "  rank 4: --x 1; --y 2",
        "  make room",
    ]
    assert [text.split("\n") for text in raised] == [expected] * len(errors)


def test_one_process_has_no_rank_to_name_and_other_errors_are_its_own() -> None:
    with raise_on_all_ranks(SingleProcess(), "nothing is wrong"):
        pass
    with (
        pytest.raises(CheckpointError, match=r"^cannot grow\n  a: full$"),
        raise_on_all_ranks(SingleProcess(), "cannot grow", describe=lambda error: f"{error.filename}: full"),
    ):
        raise OSError(28, "No space left on device", "a")
    with pytest.raises(ZeroDivisionError), raise_on_all_ranks(SingleProcess(), "cannot grow"):
        raise ZeroDivisionError
