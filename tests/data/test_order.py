"""The order of the clips: each once per epoch, the same for every way of dealing them out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualforce.data.order import clips_of_step, permutation

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
