"""Prefetcher: reads batches in a thread while earlier ones are used, in the same order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
AHEAD = 2
"""Batches that are ready or being read, while one before them is used."""
THREAD_NAME = "prefetcher"


class Prefetcher(Iterator[Item], Generic[Item]):
    """The items of an iterator, which one thread reads before they are asked for.

    An error of the iterator is raised where its item is asked for. `close` ends the thread, or leaving the
    `with` block; the interpreter's end does too.
    """

    def __init__(self, items: Iterator[Item], ahead: int = AHEAD, begin: Callable[[], None] = lambda: None):
        """Read nothing before the first item is asked for; the thread calls `begin` before it reads."""
        self._items, self._ahead = items, ahead
        self._reader = ThreadPoolExecutor(1, THREAD_NAME, begin)
        self._read: deque[Future[Item]] = deque()

    def __next__(self) -> Item:
        while len(self._read) <= self._ahead:
            self._read.append(self._reader.submit(next, self._items))
        return self._read.popleft().result()

    def close(self) -> None:
        """End the thread, once it has read what it is reading; nothing may be asked for afterwards."""
        self._reader.shutdown(cancel_futures=True)
        self._read.clear()

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
