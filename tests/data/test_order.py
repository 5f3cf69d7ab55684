"""The order of the clips: each once per epoch, the same for every way of dealing them out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualforce.data.order import ClipOrder, ClipRef, permutation, worker_of

SET = "5e" * 32  # hash of a shard set
counts = st.integers(1, 60)
per_step = st.integers(1, 40)
seeds = st.integers(0, 2**32)
hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(hashes, counts, seeds, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(shards: str, count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(shards, seed, epoch, count).tolist()) == list(range(count))


@given(counts, per_step, seeds)
def test_each_clip_once_per_epoch(count: int, clips: int, seed: int) -> None:
    order, steps = ClipOrder(SET, seed, count), -(-3 * count // clips)
    refs = [ref for step in range(steps) for ref in order.clips_of_step(step, clips)]
    for epoch in range(3):
        mine = [ref for ref in refs if ref.epoch == epoch]
        assert [ref.position for ref in mine] == list(range(count))
        assert sorted(ref.index for ref in mine) == list(range(count))


@given(counts, seeds, st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_the_sequence_does_not_depend_on_the_step_size(
    count: int, seed: int, step: int, small: int, factor: int
) -> None:
    order = ClipOrder(SET, seed, count)
    large = order.clips_of_step(step, small * factor)
    parts = [ref for k in range(factor) for ref in order.clips_of_step(step * factor + k, small)]
    assert large == parts


@given(counts, seeds, st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=12))
def test_what_was_asked_before_changes_nothing(count: int, seed: int, asked: list[tuple[int, int]]) -> None:
    """Steps in any order, as of several processes and resumptions; permutations that are kept do not tell."""
    order = ClipOrder(SET, seed, count)
    for step, clips in asked:
        assert order.clips_of_step(step, clips) == ClipOrder(SET, seed, count).clips_of_step(step, clips)
    assert len(order._epochs) <= 2


RANKS = (1, 2, 3, 4, 8)  # data-parallel sizes; each with 24 clips a step, or a multiple
LAYOUTS = [(dp, sp, workers) for dp in RANKS for sp in (1, 2, 4) for workers in (0, 1, 4)]


def dealt(shards: str, seed: int, count: int, clips: int, steps: range, layout: tuple[int, int, int]) -> list[ClipRef]:
    """The clips of `steps` as the ranks of a layout get them, in order; those that share a clip get the same.

    Every process has an order of its own, and reads only the steps that fall to it.
    """
    dp, sp, workers = layout
    ranks: list[list[list[ClipRef]]] = []
    for rank in range(dp * sp):
        read = {}
        for worker in range(max(workers, 1)):
            order = ClipOrder(shards, seed, count)
            mine = [step for step in steps if not workers or worker_of(step, workers) == worker]
            read.update({step: order.clips_of_rank(step, clips, rank // sp, dp) for step in mine})
        ranks.append([read[step] for step in steps])
    for first in range(0, dp * sp, sp):
        assert all(ranks[first + other] == ranks[first] for other in range(sp))
    assert all(len(part) == clips // dp for rank in ranks for part in rank)
    return [ref for number in range(len(steps)) for rank in ranks[::sp] for ref in rank[number]]


@settings(max_examples=1000, deadline=None)
@given(hashes, counts, st.integers(1, 2), seeds, st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4), st.data())
def test_no_kill_and_no_layout_changes_what_is_read(
    shards: str, count: int, factor: int, seed: int, layouts: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """A run that is killed at any step and goes on with other ranks, workers and sequence-parallel sizes: the same
    clips, each once an epoch."""
    clips, steps = 24 * factor, data.draw(st.integers(1, 6))
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=len(layouts) - 1, max_size=len(layouts) - 1)))
    found, begin = [], 0
    for layout, stop in zip(layouts, [*stops, steps], strict=True):
        found += dealt(shards, seed, count, clips, range(begin, stop), layout)
        begin = stop
    order = ClipOrder(shards, seed, count)
    assert found == [ref for step in range(steps) for ref in order.clips_of_step(step, clips)]
    for epoch in range(len(found) // count):
        mine = found[epoch * count : (epoch + 1) * count]
        assert [(ref.epoch, ref.position) for ref in mine] == [(epoch, position) for position in range(count)]
        assert [ref.index for ref in mine] == permutation(shards, seed, epoch, count).tolist()


@given(counts, seeds, st.integers(0, 9), st.data())
def test_replacements_are_every_other_clip_once(count: int, seed: int, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, count - 1))
    order = permutation(SET, seed, epoch, count).tolist()
    ref = ClipRef(epoch, position, order[position])
    found = list(ClipOrder(SET, seed, count).replacements(ref))
    assert [other.index for other in found] == (order[position + 1 :] + order[:position])
    assert all(other[:2] == ref[:2] for other in found)


def test_sets_epochs_and_seeds_differ() -> None:
    orders = [
        permutation(shards, seed, epoch, 50).tolist() for shards in (SET, "5f" * 32) for seed in (0, 1)
        for epoch in (0, 1)
    ]  # fmt: skip
    assert len({tuple(order) for order in orders}) == 8


def test_the_order_is_the_same_on_every_platform() -> None:
    """Numbers written down once: a change here means that old runs no longer resume on their order."""
    assert permutation(SET, 0, 0, 8).tolist() == [3, 2, 6, 5, 0, 4, 1, 7]
    assert permutation(SET, 7, 3, 8).tolist() == [5, 4, 3, 1, 6, 0, 2, 7]


@pytest.mark.parametrize(("step", "clips", "count", "seed"), [(-1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)])
def test_impossible_requests(step: int, clips: int, count: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"expected (step|seed) >= 0"):
        ClipOrder(SET, seed, count).clips_of_step(step, clips)


@pytest.mark.parametrize(("rank", "size"), [(0, 5), (2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rank < size"):
        ClipOrder(SET, 0, 5).clips_of_rank(0, 12, rank, size)
