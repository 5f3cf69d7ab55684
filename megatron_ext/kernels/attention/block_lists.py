"""Block lists of a FramePlan: for every tile of queries the tiles of keys it sees, and the transpose for the backward.

Legend: T tokens a frame, L = F * T tokens, M query blocks, N key blocks, R rows of a list (M forward, N backward).

A tile is *full* when every pair in it is visible and *partial* when some are. The bounds of a plan never move back, so
each row of each list is at most two intervals, found from the bounds at the row's first and last token: O(R) work and
no mask. Where all rows of a list share their end or their beginning, one row of indices serves them all (stride 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.kernels.attention.plan import FramePlan

BLOCK = 128


class BlockList(NamedTuple):
    """int32 on the CPU: row r sees blocks[r, :counts[r]]."""

    counts: Tensor  # [R]
    blocks: Tensor  # [R, most]; may be one row expanded


class BlockLists(NamedTuple):
    """Tiles that need a mask and tiles that need none."""

    partial: BlockList
    full: BlockList


class _Rows(NamedTuple):
    """Per row two half-open intervals of blocks, [R] each: [0, sink) or [sink_start, ..), and [start, stop)."""

    sink_start: Tensor
    sink_stop: Tensor
    start: Tensor
    stop: Tensor


def token_bounds(plan: FramePlan, query_tokens: int, key_tokens: int) -> Tensor:
    """(sink, first, last) of every query token in key tokens, int32 [3, L_q]: key k is seen when k < sink or
    first <= k < last."""
    bounds = torch.tensor(plan.bounds, dtype=torch.int32, device="cpu") * key_tokens
    return bounds.repeat_interleave(query_tokens, dim=1)


def block_lists(plan: FramePlan, query_tokens: int, key_tokens: int, key_frames: int) -> tuple[BlockLists, BlockLists]:
    """(forward, backward): key blocks of every query block, and query blocks of every key block."""
    full, seen = _forward_rows(plan, query_tokens, key_tokens)
    queries = -(-plan.query_frames * query_tokens // BLOCK)
    keys = -(-key_frames * key_tokens // BLOCK)
    forward = BlockLists(_list(_without(seen, full), keys), _list(_pair(full), keys))
    full_back, seen_back = (_transposed(rows, queries, keys) for rows in (full, seen))
    return forward, BlockLists(_list(_without(seen_back, full_back), queries), _list(_pair(full_back), queries))


def _forward_rows(plan: FramePlan, query_tokens: int, key_tokens: int) -> tuple[_Rows, _Rows]:
    """Blocks that all rows of a query block see whole, and blocks of which some row sees some key."""
    length = plan.query_frames * query_tokens
    begin = torch.arange(0, length, BLOCK, device="cpu")
    end = (begin + BLOCK).clamp_max(length) - 1
    bounds = torch.tensor(plan.bounds, dtype=torch.int64, device="cpu") * key_tokens
    low, high = bounds[:, begin // query_tokens], bounds[:, end // query_tokens]
    zero = torch.zeros_like(begin)
    full = _Rows(zero, low[0] // BLOCK, _ceil(high[1]), low[2] // BLOCK)
    seen = _Rows(zero, _ceil(high[0]), low[1] // BLOCK, _ceil(high[2]))
    return full, seen


def _transposed(rows: _Rows, queries: int, keys: int) -> _Rows:
    """Query blocks m of every key block n: those with start(m) <= n < stop(m), and those with n < sink_stop(m). Both
    are intervals because start, stop and sink_stop never fall with m."""
    block = torch.arange(keys, device="cpu")
    sink_start = torch.searchsorted(rows.sink_stop, block, right=True)
    start, stop = (torch.searchsorted(edge, block, right=True) for edge in (rows.stop, rows.start))
    # A row that sees no tile whole has start >= stop; then n falls in no interval of it, as start(m) > n wherever
    # stop(m) > n would be reached too late.
    return _Rows(sink_start, torch.full_like(block, queries), start, stop.maximum(start))


def _pair(rows: _Rows) -> list[tuple[Tensor, Tensor]]:
    """The two intervals of every row as disjoint (start, stop), in order."""
    a, b = (rows.sink_start, rows.sink_stop), (rows.start, rows.stop)
    first, second = (a, b) if bool((a[0] <= b[0]).all()) else (b, a)
    first_stop = torch.maximum(*first)
    start = torch.maximum(second[0], first_stop)
    return [(first[0], first_stop), (start, torch.maximum(second[1], start))]


def _without(seen: _Rows, full: _Rows) -> list[tuple[Tensor, Tensor]]:
    """Blocks of `seen` that are not in `full`, as disjoint intervals in order."""
    pieces = _pair(seen)
    for cut_start, cut_stop in _pair(full):
        rest = []
        for start, stop in pieces:
            empty = cut_stop <= cut_start
            left_stop = torch.where(empty, stop, torch.minimum(stop, cut_start)).maximum(start)
            right_start = torch.where(empty, stop, torch.maximum(start, cut_stop)).minimum(stop).maximum(left_stop)
            rest += [(start, left_stop), (right_start, stop)]
        pieces = rest
    return pieces


def _list(pieces: list[tuple[Tensor, Tensor]], blocks: int) -> BlockList:
    """The blocks of disjoint intervals; one shared row of indices where every row begins at 0 or ends at `blocks`."""
    lengths = torch.stack([stop - start for start, stop in pieces])
    count = lengths.sum(0)
    most = max(int(count.max()), 1)
    begins = torch.stack([start for start, _ in pieces])
    if bool((lengths == count).any(0).all()):
        which = lengths.argmax(0, keepdim=True)
        begin = begins.gather(0, which)[0]
        place = torch.arange(most, dtype=torch.int32, device="cpu")
        some = count > 0
        if bool((begin[some] == 0).all()):
            return BlockList(count.int(), place.expand(len(count), most))
        if bool((begin[some] + count[some] == blocks).all()):
            return BlockList(count.int(), (blocks - 1 - place).expand(len(count), most))
    place = torch.arange(most, device="cpu")
    index = torch.zeros(len(count), most, dtype=torch.int64, device="cpu")
    before = torch.zeros_like(count)
    for (start, stop), length in zip(pieces, lengths, strict=True):
        inside = (place >= before[:, None]) & (place < (before + length)[:, None])
        index = torch.where(inside, start[:, None] + place - before[:, None], index)
        before = before + stop - start
    return BlockList(count.int(), index.int())


def _ceil(tokens: Tensor) -> Tensor:
    return (tokens + BLOCK - 1) // BLOCK
