"""Block lists against the mask that they stand for, element by element."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualforce.model.path import ChunkRule
from megatron_ext.kernels.attention.block_lists import BLOCK, BlockLists, block_lists, token_bounds
from megatron_ext.kernels.attention.plan import FramePlan


def mask_of(plan: FramePlan, query_tokens: int, key_tokens: int, key_frames: int) -> Tensor:
    """[L_q, L_k] bool from the plan's ranges."""
    frames = torch.zeros(plan.query_frames, key_frames, dtype=torch.bool)
    for (start, stop), ranges in zip(plan.runs, plan.visible, strict=True):
        for first, last in ranges:
            frames[start:stop, first:last] = True
    return frames.repeat_interleave(query_tokens, 0).repeat_interleave(key_tokens, 1)


def tiles(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(some pair is visible, every pair of the tile is there and visible), [M, N] each."""
    rows, cols = (-(-size // BLOCK) for size in mask.shape)
    some, every = torch.zeros(rows, cols, dtype=torch.bool), torch.zeros(rows, cols, dtype=torch.bool)
    for m in range(rows):
        for n in range(cols):
            tile = mask[m * BLOCK : (m + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK]
            some[m, n], every[m, n] = tile.any(), tile.all() and tile.shape[1] == BLOCK
    return some, every


def listed(lists: BlockLists, blocks: int) -> list[Tensor]:
    """[R, blocks] bool of the partial and of the full list; an index must not occur twice."""
    found = []
    for count, index in lists:
        marks = torch.zeros(len(count), blocks, dtype=torch.int64)
        for row in range(len(count)):
            for place in range(int(count[row])):
                marks[row, index[row, place]] += 1
        assert int(marks.max()) <= 1
        found.append(marks.bool())
    return found


def check(plan: FramePlan, query_tokens: int, key_tokens: int, key_frames: int) -> None:
    mask = mask_of(plan, query_tokens, key_tokens, key_frames)
    some, every = tiles(mask)
    forward, backward = block_lists(plan, query_tokens, key_tokens, key_frames)
    for lists, seen, whole in ((forward, some, every), (backward, some.T, every.T)):
        partial, full = listed(lists, seen.shape[1])
        assert not (partial & full).any()
        assert not (full & ~whole).any(), "a tile without a mask that needs one"
        assert not (seen & ~(partial | full)).any(), "a visible tile is missing"
    # The two directions walk the same tiles.
    assert torch.equal(listed(forward, some.shape[1])[1], listed(backward, some.shape[0])[1].T)
    sink, first, last = token_bounds(plan, query_tokens, key_tokens)
    key = torch.arange(mask.shape[1])
    assert torch.equal(mask, (key < sink[:, None]) | ((key >= first[:, None]) & (key < last[:, None])))


rules = st.builds(ChunkRule, st.integers(1, 4), st.none() | st.integers(1, 3), st.integers(0, 2))
sizes = st.sampled_from([(128, 128), (256, 256), (100, 100), (260, 260), (70, 4), (4, 70), (300, 128), (1, 1)])


@settings(max_examples=120, deadline=None)
@given(rule=rules, frames=st.integers(1, 9), tokens=sizes)
def test_all_frames(rule: ChunkRule, frames: int, tokens: tuple[int, int]) -> None:
    check(rule.plan(range(frames), range(frames)), *tokens, frames)


@settings(max_examples=60, deadline=None)
@given(rule=rules, size=st.integers(1, 3), ranks=st.integers(1, 3), data=st.data(), tokens=sizes)
def test_a_ranks_frames(rule: ChunkRule, size: int, ranks: int, data: st.DataObject, tokens: tuple[int, int]) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    plan = rule.plan(range(rank * size, (rank + 1) * size), range(ranks * size))
    check(plan, *tokens, ranks * size)


def test_long_clips_share_one_row_of_indices() -> None:
    """390 frames of 1024 tokens: 3120 rows of up to 3120 blocks each would be 39 MB a list."""
    forward, backward = block_lists(ChunkRule(2, None, 0).plan(range(390), range(390)), 1024, 1024, 390)
    for lists in (forward, backward):
        assert lists.full.blocks.stride(0) == 0
        assert lists.full.blocks.untyped_storage().nbytes() <= 4 * 3120
        assert int(lists.partial.counts.sum()) == 0


def test_a_window_bounds_the_lists() -> None:
    forward, backward = block_lists(ChunkRule(2, 3, 1).plan(range(201), range(201)), 128, 128, 201)
    assert forward.full.blocks.shape[1] == 1 + 3 * 2  # sink and three chunks of two frames
    assert backward.full.blocks.shape[1] == 201  # everyone sees the sink
    assert int(backward.full.counts[50]) == 3 * 2  # its own chunk and the next two
