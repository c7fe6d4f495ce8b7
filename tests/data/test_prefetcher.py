"""What a thread reads ahead is what would have been read, and the thread ends with its prefetcher."""

import threading
from collections.abc import Iterator
from itertools import islice

import pytest

from megatron_nexus.data.prefetcher import THREAD_NAME, Prefetcher
from megatron_nexus.errors import DataError
from tests.support.waiting import TIMEOUT_S


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def test_items_come_in_order_and_their_error_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise DataError("truncated")

    with Prefetcher(items()) as read:
        assert [*islice(read, 5)] == [0, 1, 2, 3, 4]
        with pytest.raises(DataError, match="truncated"):
            next(read)
    with Prefetcher(iter(range(3))) as read:
        assert [*read] == [0, 1, 2]
    assert not readers()


def test_the_next_items_are_read_while_one_is_used_and_no_more() -> None:
    began: list[int] = []
    second_is_read, third_may_be_read = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        for index in range(9):
            began.append(index)
            if index == 1:
                second_is_read.set()
            if index == 2:
                assert third_may_be_read.wait(TIMEOUT_S)
            yield index

    with Prefetcher(items(), ahead=2) as read:
        assert next(read) == 0
        assert second_is_read.wait(TIMEOUT_S), "nobody reads while the first item is used"
        third_may_be_read.set()
    assert began in ([0, 1], [0, 1, 2]), "more was read than asked for"
    assert not readers()


def test_nothing_is_read_before_the_first_item_is_asked_for() -> None:
    began: list[int] = []
    with Prefetcher((began.append(index) for index in range(9)), begin=lambda: began.append(-1)) as read:
        assert not began and not readers()
        next(read)
    assert began[:2] == [-1, 0] and len(began) <= 4
