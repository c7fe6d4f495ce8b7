"""Bounded store: the ranks' store over a connection of its own, which answers within a time, or raises.

torch's client waits for ever for a server whose process is stopped: it connects, and nobody reads. So a
thread of its own asks; once an answer is late there are no more.
"""

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

T = TypeVar("T")


class BoundedStore:
    """Connects at the first call. Every method raises RuntimeError where the server does not answer."""

    def __init__(self, address: str, port: int, prefix: str, timeout_s: float) -> None:
        self._address, self._port, self._prefix, self._timeout_s = address, port, prefix, timeout_s
        self._asking = threading.Lock()
        self._questions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._is_late = False

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        return self._ask(lambda store: store.add(key, amount))

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda store: store.set(key, value))

    def get(self, key: str) -> str:
        """Return the value of a key that is there."""
        return self._ask(lambda store: store.get(key)).decode()

    def has(self, key: str) -> bool:
        """Return whether a key is there."""
        return self._ask(lambda store: store.check([key]))

    def delete(self, key: str) -> None:
        """Delete a key, if it is there."""
        self._ask(lambda store: store.delete_key(key))

    def _connected(self) -> Store:
        if self._store is None:
            timeout = timedelta(seconds=self._timeout_s)
            client = TCPStore(self._address, self._port, None, False, timeout, wait_for_workers=False)
            self._store = PrefixStore(self._prefix, client)
        return self._store

    def _ask(self, question: Callable[[Store], T]) -> T:
        answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put(question(self._connected()))
            except RuntimeError as error:
                answers.put(error)

        with self._asking:
            if self._thread is None:
                self._thread = threading.Thread(target=self._answer, daemon=True, name="bounded store")
                self._thread.start()
            try:
                if self._is_late:
                    raise queue.Empty
                self._questions.put(answer)
                found = answers.get(timeout=self._timeout_s)
            except queue.Empty:
                self._is_late = True
                raise RuntimeError(f"the store at {self._address}:{self._port} does not answer") from None
        if isinstance(found, Exception):
            raise found
        return found

    def _answer(self) -> None:
        while True:
            self._questions.get()()
