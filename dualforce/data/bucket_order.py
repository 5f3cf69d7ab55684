"""Which bucket of clips each optimizer step is of, and which of its clips: a pure function of the step, as `order` is.

A bucket is a shard set, whose clips have one size and one length, and a step is of one bucket on all ranks, so that
none waits for another's longer clips. Steps are dealt in cycles in which every bucket has a number of steps that is
exactly in proportion to its clips (the counts divided by their greatest common divisor): so all buckets come to the end
of an epoch together, and each clip of the run comes exactly once in every epoch of its bucket. Within a cycle the k-th
of a bucket's m steps lies at a random place in the k-th of m equal parts, which keeps the mixture even at all times.

The first steps of a run are one of each bucket, the largest clips first: what does not fit fails there and then.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualforce.data.order import ClipOrder, ClipRef, random_words


class BucketSize(NamedTuple):
    """What the order needs to know of a bucket: hash of its set, number of clips in its split, latent values of one."""

    shards: str
    clips: int
    values: int


class BucketOrder:
    """The order of all clips of a run. With one bucket it is that of `ClipOrder`.

    A clip's `position` is counted over the buckets, so that no two clips of a run share their noise.
    Raises ValueError for no bucket, a negative seed or a count below 1.
    """

    def __init__(self, buckets: Sequence[BucketSize], seed: int) -> None:
        if not buckets:
            raise ValueError("no buckets: expected at least one")
        self._orders = [ClipOrder(bucket.shards, seed, bucket.clips) for bucket in buckets]
        self._offsets = list(accumulate((bucket.clips for bucket in buckets[:-1]), initial=0))
        divisor = math.gcd(*(bucket.clips for bucket in buckets))
        self._steps = [bucket.clips // divisor for bucket in buckets]  # of each bucket in a cycle
        self._by_size = sorted(range(len(buckets)), key=lambda number: -buckets[number].values)
        self._key, self._seed = joint_hash([bucket.shards for bucket in buckets]), seed
        self._cycles: dict[int, _Cycle] = {}  # the last two: a step needs no more

    def bucket_of_step(self, step: int) -> int:
        """Number of the bucket that all clips of optimizer step `step` (from 0) are of."""
        return self._place(step)[0]

    def clips_of_rank(self, step: int, clips_per_step: int, dp_rank: int, dp_size: int) -> list[ClipRef]:
        """The part of data-parallel rank `dp_rank` in step `step`, as `ClipOrder.clips_of_rank` deals; raises as it."""
        if step < 0:
            raise ValueError(f"step {step}: expected step >= 0")
        bucket, number = self._place(step)
        found = self._orders[bucket].clips_of_rank(number, clips_per_step, dp_rank, dp_size)
        return [self._moved(ref, bucket, self._offsets[bucket]) for ref in found]

    def replacements(self, ref: ClipRef) -> Iterator[ClipRef]:
        """As `ClipOrder.replacements`, from the same bucket."""
        offset = self._offsets[ref.bucket]
        for other in self._orders[ref.bucket].replacements(self._moved(ref, ref.bucket, -offset)):
            yield self._moved(other, ref.bucket, offset)

    def _place(self, step: int) -> tuple[int, int]:
        """(bucket, number of the step among the steps of that bucket)."""
        cycle, slot = divmod(step, sum(self._steps))
        made = self._cycle(cycle)
        bucket = int(made.buckets[slot])
        return bucket, cycle * self._steps[bucket] + int(made.numbers[slot])

    def _cycle(self, cycle: int) -> _Cycle:
        found = self._cycles.get(cycle)
        if found is None:
            found = _make_cycle(self._steps, self._words(cycle), self._by_size if cycle == 0 else [])
            for old in sorted(self._cycles)[:-1]:
                self._cycles.pop(old, None)
            self._cycles[cycle] = found
        return found

    def _words(self, cycle: int) -> NDArray[np.uint64]:
        return random_words(f"{self._key} steps", self._seed, cycle, sum(self._steps))

    @staticmethod
    def _moved(ref: ClipRef, bucket: int, offset: int) -> ClipRef:
        return ref._replace(bucket=bucket, position=ref.position + offset)


def joint_hash(hashes: Sequence[str]) -> str:
    """Hash of a run's shard sets in their order: that of the set where there is one."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{one}\n" for one in hashes).encode()).hexdigest()


class _Cycle(NamedTuple):
    buckets: NDArray[np.int32]  # of each step
    numbers: NDArray[np.int64]  # of the step among those of its bucket in this cycle


def _make_cycle(steps: Sequence[int], words: NDArray[np.uint64], first: Sequence[int]) -> _Cycle:
    """A cycle with `steps[b]` steps of bucket b, spread by `words` [sum of steps]; it begins with one step of each
    bucket of `first`."""
    # Exact to the last bit on every machine: one division by 2^64, one sum and one division in IEEE double precision.
    shares = words / 2.0**64
    parts = np.split(shares, np.cumsum(steps)[:-1])
    places = np.concatenate([(np.arange(m) + part) / m for m, part in zip(steps, parts, strict=True)])
    labels = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
    buckets = labels[np.argsort(places, kind="stable")]
    if first:
        taken = [int(np.argmax(buckets == bucket)) for bucket in first]
        buckets = np.concatenate((np.asarray(first, dtype=np.int32), np.delete(buckets, taken)))
    numbers = np.empty(len(buckets), dtype=np.int64)
    for bucket, count in enumerate(steps):
        numbers[buckets == bucket] = np.arange(count)
    return _Cycle(buckets, numbers)
