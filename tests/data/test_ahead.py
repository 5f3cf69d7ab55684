"""Several clips at a time: each is what it would be alone, in the order in which they are taken."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from dualforce.data.ahead import AHEAD, ReadAhead


class Slow:
    """Counts what is read, by whom, and how many at a time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.keys: list[int] = []
        self.threads: set[str] = set()
        self.now = self.most = 0
        self._seconds, self._lock = seconds, threading.Lock()

    def __call__(self, key: int) -> str:
        with self._lock:
            self.keys.append(key)
            self.threads.add(threading.current_thread().name)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self._seconds)
        with self._lock:
            self.now -= 1
        if key < 0:
            raise ValueError(f"no {key}")
        return f"item {key}"


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_items_come_as_they_are_taken(threads: int) -> None:
    read = Slow()
    ahead = ReadAhead(read, threads)
    for first in (0, 100):
        keys = [first, first + 1, first + 1, -1, first + 2, *range(first + 3, first + 30)]
        ahead.expect(keys)
        for key in keys:
            if key < 0:
                with pytest.raises(ValueError, match="no -1"):
                    ahead.take(key)
                assert ahead.take(first + 50) == f"item {first + 50}"  # another in its place
            else:
                assert ahead.take(key) == f"item {key}"
    assert len(read.keys) == 2 * (len(keys) + 1)  # each once, the one in place too
    assert (threading.current_thread().name in read.threads) and len(read.threads) <= threads + 1


def test_as_many_are_read_at_a_time_as_there_are_threads() -> None:
    read = Slow(0.02)
    ahead = ReadAhead(read, 4)
    ahead.expect(range(60))
    time.sleep(1.0)
    assert sorted(read.keys) == list(range(4 * AHEAD)), "no more wait to be taken"
    began = time.perf_counter()
    assert [ahead.take(key) for key in range(60)] == [f"item {key}" for key in range(60)]
    assert 2 <= read.most <= 4 and time.perf_counter() - began < 60 * 0.02


def test_one_thread_is_the_caller() -> None:
    read = Slow()
    ahead = ReadAhead(read, 1)
    ahead.expect([1, 2])
    assert not read.keys
    assert ahead.take(2) == "item 2" and read.threads == {threading.current_thread().name}


def test_what_is_no_longer_expected_is_dropped() -> None:
    read = Slow(0.01)
    ahead = ReadAhead(read, 2)
    ahead.expect([1, 2, 3, 4, 5])
    ahead.expect([7, 8, 9])
    assert [ahead.take(key) for key in (7, 9)] == ["item 7", "item 9"]
    assert not {4, 5} & set(read.keys)


def test_threads_end_with_the_object() -> None:
    def alive() -> int:
        return sum(thread.name.startswith("dualforce-clip-") for thread in threading.enumerate())

    def all_gone() -> bool:
        gc.collect()
        ends = time.monotonic() + 5
        while alive() and time.monotonic() < ends:
            time.sleep(0.01)
        return not alive()

    assert all_gone()  # those of other tests
    ahead = ReadAhead(Slow(), 3)
    ahead.expect([1])
    assert ahead.take(1) == "item 1" and alive() == 3
    del ahead
    assert all_gone()
