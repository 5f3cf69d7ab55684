"""Reads whole optimizer steps ahead of the training loop, in one background thread."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from data_shards.reader import ShardReader
from data_shards.schema import ClipSample, ShardError
from dualforce.config import ConfigError, DataConfig
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef, clips_of_rank, replacements
from dualforce.data.statistics import StreamStatistics
from dualforce.types import AUDIO_FRAMES, ClipBatch

ItemT = TypeVar("ItemT")


class Damaged(NamedTuple):
    """A clip that could not be read: the step (from 0) that met it, its key, and the reason with shard and member."""

    step: int
    key: str
    reason: str


class StepLoader(Generic[ItemT]):
    """Iterates over optimizer steps `start_step` to `stop_step - 1`; each is what `finish` makes, in the background, of
    one rank's list of micro-batches.

    The clips of a step are a pure function of (seed, step): ranks, micro-batches and resumption only deal them out.
    Data-parallel rank r takes the step's clips [r * per_rank, (r + 1) * per_rank), per_rank = clips_per_step / dp_size,
    in micro-batches of `micro_batch`. All ranks of a sequence-parallel group pass the same `dp_rank` and get the same
    clips.

    Up to `data.prefetch` finished steps wait in memory. The thread ends with the iteration, also one left early. A clip
    that cannot be read is replaced (`order.replacements`: equal damage gives equal clips on every rank) and told of in
    `damaged`, up to `data.max_damaged` of them; the next is raised as a ShardError where the step would have come,
    after the steps before it.
    Raises ConfigError for sizes that do not divide, a crop longer than the clips, or a split without clips.
    """

    def __init__(
        self,
        reader: ShardReader,
        statistics: StreamStatistics,
        data: DataConfig,
        *,
        context: int,
        text_dim: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        start_step: int,
        stop_step: int,
        finish: Callable[[list[ClipBatch]], ItemT],
    ) -> None:
        _check(reader, data, dp_rank, dp_size, micro_batch)
        self.wait_seconds = 0.0  # time the consumer waited for data, over all steps
        self.damaged: list[Damaged] = []  # clips that could not be read, as they were met; the thread is ahead
        self._unreadable: set[int] = set()
        self._reader = reader
        self._statistics = statistics
        self._data = data
        self._context = context
        self._beyond = -(-context // AUDIO_FRAMES)  # latent frames of sound that the last window looks into
        self._text_dim = text_dim
        self._seed = seed
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._micro_batch = micro_batch
        self._steps = range(start_step, stop_step)
        self._finish = finish
        self._ahead: _ReadAhead[ItemT] | None = None

    def __iter__(self) -> Iterator[ItemT]:
        """Steps from `start_step` on; a second call ends the first iteration and starts again."""
        self.close()
        ahead = _ReadAhead(lambda step: self._finish(self.step(step)), self._steps, self._data.prefetch)
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

    def step(self, step: int) -> list[ClipBatch]:
        """Read and collate the micro-batches of one step, here and now."""
        clips, count = self._data.clips_per_step, len(self._reader)
        own = clips_of_rank(step, clips, count, self._seed, self._dp_rank, self._dp_size)
        return [self._batch(step, own[i : i + self._micro_batch]) for i in range(0, len(own), self._micro_batch)]

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end; the iteration ends too. Harmless when nothing runs."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _batch(self, step: int, refs: list[ClipRef]) -> ClipBatch:
        samples = [self._read(step, ref) for ref in refs]
        return collate(samples, refs, self._statistics, self._data.frames, self._context, self._text_dim)

    def _read(self, step: int, ref: ClipRef) -> ClipSample:
        for choice in itertools.chain((ref,), replacements(ref, len(self._reader), self._seed)):
            if choice.index in self._unreadable:
                continue
            try:
                return self._reader.read(choice.index, self._data.frames, self._beyond)
            except ShardError as error:
                if len(self._unreadable) >= self._data.max_damaged:
                    raise self._too_many(error) from None
                self._unreadable.add(choice.index)
                self.damaged.append(Damaged(step, self._reader.keys[choice.index], str(error)))
        raise ShardError(f"{self._reader.root}: all {len(self._reader)} clips of the split are damaged: expected some")

    def _too_many(self, error: ShardError) -> ShardError:
        if not self._data.max_damaged:
            return error
        return ShardError(f"{error}; {self._data.max_damaged} before it: expected no more than data.max_damaged")


def _check(reader: ShardReader, data: DataConfig, dp_rank: int, dp_size: int, micro_batch: int) -> None:
    if dp_size < 1 or not 0 <= dp_rank < dp_size:
        raise ConfigError(f"data-parallel rank {dp_rank} of {dp_size}: expected 0 <= rank < size")
    if data.clips_per_step % dp_size:
        raise ConfigError(
            f"data.clips_per_step: {data.clips_per_step}: expected a multiple of {dp_size} data-parallel ranks"
        )
    per_rank = data.clips_per_step // dp_size
    if micro_batch < 1 or per_rank % micro_batch:
        raise ConfigError(f"micro-batch {micro_batch}: expected a divisor of the {per_rank} clips per step and rank")
    if not len(reader):
        raise ConfigError(f"data.shards: {reader.root}: 0 clips in the split: expected at least 1")
    if data.frames > reader.frames:
        raise ConfigError(
            f"data.frames: {data.frames}: expected at most {reader.frames}, the latent frames of clips in {reader.root}"
        )


class _ReadAhead(Generic[ItemT]):
    """A thread that makes the items in order and keeps at most `depth` of them waiting."""

    def __init__(self, make: Callable[[int], ItemT], steps: range, depth: int) -> None:
        self._make = make
        self._steps = steps
        self._depth = depth
        self._changed = threading.Condition()
        self._ready: deque[ItemT] = deque()
        self._fault: BaseException | None = None
        self._closed = False
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
        """End the thread after the item it is at, and drop what waits."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                item = self._make(step)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as fault:  # handed to the consumer, who is the one that can act on it
            with self._changed:
                self._fault = fault
                self._changed.notify_all()
