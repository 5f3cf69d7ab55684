"""The order of clips of several buckets: each once an epoch, one bucket a step, and the same for every layout."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualforce.data.bucket_order import BucketOrder, BucketSize, joint_hash
from dualforce.data.order import ClipOrder, ClipRef, worker_of

seeds = st.integers(0, 2**32)


def sets(counts: list[int], values: list[int] | None = None) -> list[BucketSize]:
    names = (hashlib.sha256(bytes([i])).hexdigest() for i in range(len(counts)))
    return [BucketSize(*row) for row in zip(names, counts, values or [1] * len(counts), strict=True)]


buckets = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=4).map(
    lambda rows: sets([a for a, _ in rows], [b for _, b in rows])
)


def cycle_of(given: list[BucketSize]) -> int:
    """Steps after which every bucket has come in proportion to its clips."""
    return sum(one.clips for one in given) // math.gcd(*(one.clips for one in given))


@given(st.integers(1, 60), seeds, st.integers(0, 200), st.integers(1, 9))
def test_one_bucket_is_in_the_order_of_its_clips(count: int, seed: int, step: int, clips: int) -> None:
    """Runs on one set go on as they began."""
    (one,) = sets([count])
    expected = ClipOrder(one.shards, seed, count).clips_of_step(step, clips)
    assert BucketOrder([one], seed).clips_of_rank(step, clips, 0, 1) == expected
    assert joint_hash([one.shards]) == one.shards


@settings(max_examples=300, deadline=None)
@given(buckets, seeds, st.integers(1, 8))
def test_each_clip_once_an_epoch_and_all_epochs_end_together(given: list[BucketSize], seed: int, clips: int) -> None:
    order, steps = BucketOrder(given, seed), cycle_of(given)
    found = [order.clips_of_rank(step, clips, 0, 1) for step in range(steps)]
    for step, refs in enumerate(found):
        assert {ref.bucket for ref in refs} == {order.bucket_of_step(step)}
    divisor = math.gcd(*(one.clips for one in given))
    for number, one in enumerate(given):
        mine = [ref for refs in found for ref in refs if ref.bucket == number]
        # A cycle is clips / divisor epochs of every bucket.
        assert len(mine) == clips * one.clips // divisor
        for epoch in range(len(mine) // one.clips):
            assert sorted(ref.index for ref in mine[epoch * one.clips : (epoch + 1) * one.clips]) == list(
                range(one.clips)
            )
    noise = [(ref.epoch, ref.position) for refs in found for ref in refs]
    assert len(set(noise)) == len(noise)


@settings(max_examples=300, deadline=None)
@given(buckets, seeds, st.integers(1, 3))
def test_the_mixture_is_even_at_all_times(given: list[BucketSize], seed: int, cycles: int) -> None:
    """After any number of steps a bucket is at most two steps off its share in a cycle with its first steps ahead."""
    order, steps, total = BucketOrder(given, seed), cycle_of(given), sum(one.clips for one in given)
    seen: Counter[int] = Counter()
    for step in range(cycles * steps):
        seen[order.bucket_of_step(step)] += 1
        for number, one in enumerate(given):
            # Each of the other buckets may have had one step early, and one that its random place allows.
            assert abs(seen[number] - (step + 1) * one.clips / total) <= 2 * len(given), (step, number)


@given(buckets, seeds)
def test_a_run_begins_with_the_largest_clips(given: list[BucketSize], seed: int) -> None:
    order = BucketOrder(given, seed)
    first = [order.bucket_of_step(step) for step in range(len(given))]
    assert sorted(first) == list(range(len(given)))
    values = [given[number].values for number in first]
    assert values == sorted(values, reverse=True)
    later = [order.bucket_of_step(cycle_of(given) + step) for step in range(cycle_of(given))]
    assert Counter(later) == Counter(order.bucket_of_step(step) for step in range(cycle_of(given)))


def test_cycles_and_seeds_are_mixed_anew() -> None:
    given = sets([30, 20])
    order = BucketOrder(given, 0)
    turns = [[order.bucket_of_step(5 * k + i) for k in range(40)] for i in range(5)]
    assert len({tuple(turn) for turn in turns}) == 5
    other = BucketOrder(given, 1)
    assert [other.bucket_of_step(s) for s in range(50)] != [order.bucket_of_step(s) for s in range(50)]
    swapped = BucketOrder(given[::-1], 0)
    assert [1 - swapped.bucket_of_step(s) for s in range(50)] != [order.bucket_of_step(s) for s in range(50)]


@settings(max_examples=1000, deadline=None)
@given(
    buckets, seeds, st.integers(1, 2), st.data(),
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0, 1, 4])), min_size=1, max_size=4),
)  # fmt: skip
def test_no_kill_and_no_layout_changes_what_is_read(
    given: list[BucketSize], seed: int, factor: int, data: st.DataObject, layouts: list[tuple[int, int]]
) -> None:
    """A run that stops at any step and goes on with other ranks and workers, each with an order of its own."""
    clips, steps = 24 * factor, data.draw(st.integers(1, 12))
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=len(layouts) - 1, max_size=len(layouts) - 1)))
    found: list[ClipRef] = []
    begin = 0
    for (ranks, workers), stop in zip(layouts, [*stops, steps], strict=True):
        orders = [[BucketOrder(given, seed) for _ in range(max(workers, 1))] for _ in range(ranks)]
        for step in range(begin, stop):
            reader = worker_of(step, workers) if workers else 0
            for rank in range(ranks):
                found += orders[rank][reader].clips_of_rank(step, clips, rank, ranks)
        begin = stop
    whole = BucketOrder(given, seed)
    assert found == [ref for step in range(steps) for ref in whole.clips_of_rank(step, clips, 0, 1)]


def test_replacements_are_of_the_same_bucket_and_keep_the_noise() -> None:
    order = BucketOrder(sets([5, 3]), 0)
    ref = next(r for step in range(8) for r in order.clips_of_rank(step, 1, 0, 1) if r.bucket == 1)
    others = list(order.replacements(ref))
    assert {other.bucket for other in others} == {1} and {other.position for other in others} == {ref.position}
    assert sorted([ref.index, *(other.index for other in others)]) == [0, 1, 2]


def test_the_order_of_steps_stays_what_it_is() -> None:
    """Written down: runs of today go on with what is released tomorrow, on any machine."""
    order = BucketOrder(sets([6, 4, 2], [5, 9, 1]), 7)
    assert [order.bucket_of_step(step) for step in range(12)] == FIRST_STEPS
    assert [tuple(ref[:3]) for ref in order.clips_of_rank(1000, 3, 0, 1)] == CLIPS_OF_STEP_1000


FIRST_STEPS = [1, 0, 2, 0, 1, 0, 1, 0, 1, 0, 0, 2]
CLIPS_OF_STEP_1000 = [(249, 9, 1), (250, 6, 1), (250, 7, 2)]


@pytest.mark.parametrize(("counts", "seed"), [([], 0), ([3, 0], 0), ([3, 2], -1)])
def test_impossible_orders(counts: list[int], seed: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        BucketOrder(sets(counts), seed)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="expected step >= 0"):
        BucketOrder(sets([3, 2]), 0).clips_of_rank(-1, 2, 0, 1)


def test_large_sets_are_planned_in_little_time_and_memory() -> None:
    order = BucketOrder(sets([350_003, 200_001]), 0)
    share = np.mean([order.bucket_of_step(step) for step in range(3000)])
    assert abs(share - 200_001 / 550_004) < 0.002
