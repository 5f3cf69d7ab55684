"""Clips read in several threads: a server's delays and faults then cost the time of one, not of each."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")
AHEAD = 8  # items begun for each thread, so that one that takes long does not stop the others
_Job = tuple[Future[ItemT], KeyT] | None


class ReadAhead(Generic[KeyT, ItemT]):
    """`read` for keys that are asked for in an order that is known. For one owner; `read` is called in threads.

    AHEAD x `threads` items at most are being read or wait to be taken. With one thread there is none: items are read
    when they are taken. Threads end with the object, which `read` must not hold, and hold no process up that ends.
    """

    def __init__(self, read: Callable[[KeyT], ItemT], threads: int) -> None:
        self.threads = threads if threads > 1 else 0  # that read before items are taken
        self._read, self._started = read, False
        self._jobs: queue.SimpleQueue[_Job[ItemT, KeyT]] = queue.SimpleQueue()
        self._further: deque[KeyT] = deque()
        self._begun: deque[tuple[KeyT, Future[ItemT]]] = deque()

    def expect(self, keys: Sequence[KeyT]) -> None:
        """These will be taken, in this order, and nothing else that was expected before; what has begun of them, in
        this order, goes on."""
        self._start()
        self._further = deque(keys if self.threads else ())
        before, self._begun = self._begun, deque()
        for key, future in before:
            if self._further and self._further[0] == key:
                self._further.popleft()
                self._begun.append((key, future))
            else:
                future.cancel()
        while self._further and len(self._begun) < AHEAD * self.threads:
            self._begin()

    def take(self, key: KeyT) -> ItemT:
        """The item of `key`; raises what `read` raised. One that was expected is read by now, or is being read, and
        those expected before it are dropped."""
        if all(begun != key for begun, _ in self._begun):
            return self._read(key)
        while True:
            begun, future = self._begun.popleft()
            self._begin()
            if begun == key:
                return future.result()
            future.cancel()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for number in range(self.threads):
            name = f"dualforce-clip-{number}"
            threading.Thread(target=_work, args=(self._read, self._jobs), name=name, daemon=True).start()
        weakref.finalize(self, _end, self._jobs, self.threads).atexit = False

    def _begin(self) -> None:
        if self._further:
            key = self._further.popleft()
            future: Future[ItemT] = Future()
            self._begun.append((key, future))
            self._jobs.put((future, key))


def _work(read: Callable[[KeyT], ItemT], jobs: queue.SimpleQueue[_Job[ItemT, KeyT]]) -> None:
    while (job := jobs.get()) is not None:
        future, key = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(key))
            except BaseException as fault:  # handed over, to whoever takes the item
                future.set_exception(fault)
        del job, future  # the item is the taker's alone


def _end(jobs: queue.SimpleQueue[_Job[ItemT, KeyT]], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)
