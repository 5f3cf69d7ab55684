"""Reads whole optimizer steps ahead of the training loop: in a background thread, or in processes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.data.steps import Damaged, Deal, StepRead, StepReader
from dualforce.data.workers import Split, WorkerPool
from dualforce.types import ClipBatch

ItemT = TypeVar("ItemT")
SPLIT = "train"


class StepLoader(Generic[ItemT]):
    """Iterates over optimizer steps `start_step` to `stop_step - 1`; each is what `finish` makes, in the background, of
    one rank's list of micro-batches.

    `sets` are those of `data.shards`; a step is of one of them. Its clips are a pure function of (hashes of the sets,
    seed, step): ranks, micro-batches, workers and resumption only deal them out (`Deal`). All ranks of a
    sequence-parallel group pass the same `dp_rank` and get the same clips.

    Steps are read by `data.workers` processes, or by the thread itself if that is 0; `finish` is called in the thread.
    Up to `data.prefetch` finished steps wait in memory, and each process has one more at hand. Thread and processes end
    with the iteration, also one left early.

    A clip that cannot be read is replaced (`StepReader`) and told of in `damaged`, up to `data.max_damaged` of them in
    all processes together with those `known` from before, as (number of the set, key); the next is raised as a
    ShardError where the step would have come, after the steps before it. So is the LoaderError of a process that died.
    Raises ConfigError as `Deal.check`.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        deal: Deal,
        start_step: int,
        stop_step: int,
        finish: Callable[[list[ClipBatch]], ItemT],
        known: Iterable[tuple[int, str]] = (),
    ) -> None:
        readers = [opened.split(SPLIT) for opened in sets]
        deal.check(readers)
        self.wait_seconds = 0.0  # time the consumer waited for data, over all steps
        self.damaged: list[Damaged] = []  # clips that could not be read, in the order of the steps; the thread is ahead
        self._met: set[tuple[int, str]] = set()  # bucket and key of them
        self._counted = set(known)  # and of those before
        self._splits = [Split(opened.source, SPLIT, opened.hash) for opened in sets]
        self._here = StepReader(readers, [opened.hash for opened in sets], deal)
        self._deal = deal
        self._steps = range(start_step, stop_step)
        self._finish = finish
        self._ahead: _ReadAhead[ItemT] | None = None

    def __iter__(self) -> Iterator[ItemT]:
        """Steps from `start_step` on; a second call ends the first iteration and starts again."""
        self.close()
        data = self._deal.data
        pool = WorkerPool(self._splits, self._deal, self._steps, data.workers) if data.workers else None

        def make(step: int) -> ItemT | None:
            then = range(step + 1, self._steps.stop)
            found = self._here.read(step, then) if pool is None else pool.take()
            return None if found is None else self._finish(self._accepted(found))

        ahead = _ReadAhead(make, self._steps, data.prefetch, pool)
        self._ahead = ahead
        try:
            for _ in self._steps:
                began = time.perf_counter()
                item = ahead.take()
                self.wait_seconds += time.perf_counter() - began
                if item is None:  # closed from outside
                    return
                yield item
        finally:
            ahead.close()

    def bucket_of_step(self, step: int) -> int:
        """Number of the set in `sets` that all clips of a step are of."""
        return self._here.bucket_of_step(step)

    def step(self, step: int) -> list[ClipBatch]:
        """Read and collate the micro-batches of one step, here and now."""
        return self._accepted(self._here.read(step))

    def close(self) -> None:
        """Stop reading ahead and wait for thread and processes to end; the iteration ends too. Harmless when nothing
        runs."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _accepted(self, found: StepRead) -> list[ClipBatch]:
        """The micro-batches of a step, after its damage has been counted."""
        most = self._deal.data.max_damaged
        for one in found.damaged:
            clip = one.bucket, one.key
            if clip in self._met:
                continue
            if clip not in self._counted and len(self._counted) >= most:
                before = f"; {most} before it: expected no more than data.max_damaged" if most else ""
                raise ShardError(f"{one.reason}{before}")
            self._met.add(clip)
            self._counted.add(clip)
            self.damaged.append(one)
        if found.fault is not None:
            raise found.fault
        return found.batches


class _ReadAhead(Generic[ItemT]):
    """A thread that makes the items in order and keeps at most `depth` of them waiting, by means of `pool` if there is
    one."""

    def __init__(self, make: Callable[[int], ItemT | None], steps: range, depth: int, pool: WorkerPool | None) -> None:
        self._make, self._steps, self._depth, self._pool = make, steps, depth, pool
        self._changed = threading.Condition()
        self._ready: deque[ItemT] = deque()
        self._fault: BaseException | None = None
        self._closed = False
        self._closing = threading.Lock()  # the consumer and whoever closes from outside may come at once
        # A daemon, so that a process which ends in the middle of a run is not held up by its reader.
        self._thread = threading.Thread(target=self._work, name="dualforce-read-ahead", daemon=True)
        self._thread.start()

    def take(self) -> ItemT | None:
        """The next item, or None once closed; raises what the thread met, after the items before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._fault or self._closed)
            if self._closed:
                return None
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            fault = self._fault
        if fault is None:
            raise RuntimeError("the read-ahead thread ended without an item or a fault")
        raise fault

    def close(self) -> None:
        """End the thread after the item it is at, drop what waits, end the processes. From any thread, also twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        with self._closing:
            pool, self._pool = self._pool, None
            if pool is None:
                self._thread.join()
            else:
                pool.stop(self._thread)
                pool.close()

    def _work(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                item = self._make(step)
                if item is None:  # stopped
                    return
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as fault:  # handed to the consumer, who is the one that can act on it
            with self._changed:
                self._fault = fault
                self._changed.notify_all()
