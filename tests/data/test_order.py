"""The order of the clips: each once per epoch, the same for every way of dealing them out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualforce.data.order import ClipRef, clips_of_rank, clips_of_step, permutation, replacements

counts = st.integers(1, 60)
per_step = st.integers(1, 40)
seeds = st.integers(0, 2**32)


@given(counts, seeds, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(seed, epoch, count).tolist()) == list(range(count))


@given(counts, per_step, seeds)
def test_each_clip_once_per_epoch(count: int, clips: int, seed: int) -> None:
    steps = -(-3 * count // clips)
    refs = [ref for step in range(steps) for ref in clips_of_step(step, clips, count, seed)]
    for epoch in range(3):
        mine = [ref for ref in refs if ref.epoch == epoch]
        assert [ref.position for ref in mine] == list(range(count))
        assert sorted(ref.index for ref in mine) == list(range(count))


@given(counts, seeds, st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_the_sequence_does_not_depend_on_the_step_size(
    count: int, seed: int, step: int, small: int, factor: int
) -> None:
    large = clips_of_step(step, small * factor, count, seed)
    parts = [ref for k in range(factor) for ref in clips_of_step(step * factor + k, small, count, seed)]
    assert large == parts


RANKS = (1, 2, 3, 4, 8)  # data-parallel sizes; each with 24 clips a step, or a multiple
LAYOUTS = [(dp, sp) for dp in RANKS for sp in (1, 2, 4)]


def dealt(step: int, clips: int, count: int, seed: int, dp: int, sp: int) -> list[ClipRef]:
    """The clips of a step as the ranks of a layout get them, in order; those that share a clip get the same."""
    found = []
    for rank in range(0, dp * sp, sp):
        group = [clips_of_rank(step, clips, count, seed, other // sp, dp) for other in range(rank, rank + sp)]
        assert all(part == group[0] for part in group) and len(group[0]) == clips // dp
        found += group[0]
    return found


@settings(max_examples=1200, deadline=None)
@given(counts, st.integers(1, 3), seeds, st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4), st.data())
def test_no_kill_and_no_layout_changes_what_is_read(
    count: int, factor: int, seed: int, layouts: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A run that is killed at any step and goes on with other ranks: the same clips, each once an epoch."""
    clips, steps = 24 * factor, data.draw(st.integers(1, 12))
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=len(layouts) - 1, max_size=len(layouts) - 1)))
    found, begin = [], 0
    for (dp, sp), stop in zip(layouts, [*stops, steps], strict=True):
        for step in range(begin, stop):
            found += dealt(step, clips, count, seed, dp, sp)
        begin = stop
    assert found == [ref for step in range(steps) for ref in clips_of_step(step, clips, count, seed)]
    for epoch in range(len(found) // count):
        assert sorted(ref.index for ref in found[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(counts, seeds, st.integers(0, 9), st.data())
def test_replacements_are_every_other_clip_once(count: int, seed: int, epoch: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, count - 1))
    order = permutation(seed, epoch, count).tolist()
    ref = ClipRef(epoch, position, order[position])
    found = list(replacements(ref, count, seed))
    assert [other.index for other in found] == (order[position + 1 :] + order[:position])
    assert all(other[:2] == ref[:2] for other in found)


def test_epochs_and_seeds_differ() -> None:
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_platform() -> None:
    """Numbers written down once: a change here means that old runs no longer resume on their order."""
    assert permutation(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(7, 3, 8).tolist() == [7, 1, 6, 0, 4, 2, 3, 5]


@pytest.mark.parametrize(("step", "clips", "count", "seed"), [(-1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, -1)])
def test_impossible_requests(step: int, clips: int, count: int, seed: int) -> None:
    with pytest.raises(ValueError, match="expected step and seed >= 0"):
        clips_of_step(step, clips, count, seed)


@pytest.mark.parametrize(("rank", "size"), [(0, 5), (2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rank < size"):
        clips_of_rank(0, 12, 5, 0, rank, size)
