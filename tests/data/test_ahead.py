"""Several clips at a time: each is what it would be alone, in the order in which they are taken."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

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


class Held(Slow):
    """Keys 1 and 2 are held up until `go`; `wait` returns when both have begun."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self._begun = threading.Event(), threading.Semaphore(0)

    def __call__(self, key: int) -> str:
        self._begun.release()
        if key in (1, 2):
            self.go.wait(20)
        return super().__call__(key)

    def wait(self) -> None:
        assert self._begun.acquire(timeout=20) and self._begun.acquire(timeout=20)


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


def test_what_has_begun_goes_on_when_more_is_expected() -> None:
    read = Slow()
    ahead = ReadAhead(read, 2)
    ahead.expect([1, 2, 3, 3, 4, 5])
    assert [ahead.take(key) for key in (1, 2)] == ["item 1", "item 2"]
    ahead.expect([3, 3, 4, 5, 6, 7])
    assert [ahead.take(key) for key in (3, 3, 4, 5, 6, 7)] == [f"item {key}" for key in (3, 3, 4, 5, 6, 7)]
    assert sorted(read.keys) == [1, 2, 3, 3, 4, 5, 6, 7], "none twice"


def test_what_has_begun_goes_on_when_one_of_it_is_dropped() -> None:
    read = Held()
    ahead = ReadAhead(read, 2)
    ahead.expect([1, 2, 3, 4, 5])
    read.wait()
    ahead.expect([1, 2, 4, 5, 6])
    read.go.set()
    assert [ahead.take(key) for key in (1, 2, 4, 5, 6)] == [f"item {key}" for key in (1, 2, 4, 5, 6)]
    assert sorted(read.keys) == [1, 2, 4, 5, 6], "3 had not begun"


def test_no_more_is_begun_when_more_is_expected() -> None:
    held = threading.Event()
    read: list[int] = []

    def hold(key: int) -> int:
        held.wait(20)
        read.append(key)
        return key

    ahead = ReadAhead(hold, 2)
    for _ in range(3):
        ahead.expect(range(100))
    assert len(ahead._begun) == 2 * AHEAD
    held.set()
    assert [ahead.take(key) for key in range(100)] == list(range(100)) == sorted(read)


def test_each_that_is_taken_begins_another() -> None:
    read = Slow()
    ahead = ReadAhead(read, 2)
    ahead.expect(range(6 * AHEAD))
    for key in range(6 * AHEAD):
        assert ahead.take(key) == f"item {key}"
        assert len(ahead._begun) == min(2 * AHEAD, 6 * AHEAD - key - 1)
    assert threading.current_thread().name not in read.threads


def test_those_before_the_one_that_is_taken_are_dropped() -> None:
    read, found = Held(), list[str]()
    ahead = ReadAhead(read, 2)
    ahead.expect([1, 2, 3, 4, 5])
    read.wait()
    taker = threading.Thread(target=lambda: found.append(ahead.take(5)))
    taker.start()
    ends = time.monotonic() + 20
    while ahead._begun and time.monotonic() < ends:
        time.sleep(0.001)
    read.go.set()
    taker.join()
    assert found == ["item 5"] and sorted(read.keys) == [1, 2, 5]


def test_what_has_begun_is_taken_in_the_new_order() -> None:
    read = Slow()
    ahead = ReadAhead(read, 2)
    ahead.expect([1, 2, 3])
    ahead.expect([3, 1, 2])
    assert [key for key, _ in ahead._begun] == [3, 1, 2]
    assert [ahead.take(key) for key in (3, 1, 2)] == ["item 3", "item 1", "item 2"]


def test_an_item_is_the_takers_alone() -> None:
    class Item:
        pass

    ahead: ReadAhead[int, Item] = ReadAhead(lambda key: Item(), 2)
    ahead.expect([1, 2])
    items = [weakref.ref(ahead.take(key)) for key in (1, 2)]
    ends = time.monotonic() + 20
    while any(item() is not None for item in items) and time.monotonic() < ends:
        time.sleep(0.001)
    assert [item() for item in items] == [None, None]


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


def test_a_process_that_ends_is_not_held_up() -> None:
    code = (
        "import threading; from dualforce.data.ahead import ReadAhead; begun = threading.Event()\n"
        "def read(key): begun.set(); threading.Event().wait()\n"
        "ahead = ReadAhead(read, 2); ahead.expect([1, 2]); begun.wait(); print('the end')"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=True)
    assert ended.stdout == "the end\n"
