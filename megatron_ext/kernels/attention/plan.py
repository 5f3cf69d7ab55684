"""Which key frames the queries see, as data: what every attention backend is given instead of a mask.

Legend: F frames, T tokens a frame, L = F * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor

FrameRange = tuple[int, int]  # start and stop of frames


@dataclass(frozen=True, eq=False)
class FramePlan:
    """Runs of query frames, and the key frames that each run sees.

    `runs` cover the query frames 0 .. F_q in order. `visible[i]` holds one range of key frames, or two of which the
    first starts at frame 0 (the sink). From run to run no bound may move back. ValueError otherwise.

    A plan is compared by identity, so that it can key a cache at no cost: make one per shape and keep it.
    """

    runs: tuple[FrameRange, ...]
    visible: tuple[tuple[FrameRange, ...], ...]

    def __post_init__(self) -> None:
        if len(self.runs) != len(self.visible) or not self.runs:
            raise ValueError(f"{len(self.runs)} runs, {len(self.visible)} lists of key frames: expected equal numbers")
        covered = 0
        for (start, stop), ranges in zip(self.runs, self.visible, strict=True):
            if start != covered or stop <= start:
                raise ValueError(f"query frames {start}..{stop} after {covered}: expected no gap")
            covered = stop
            _check_ranges(start, ranges)
        for before, after in pairwise(zip(*self.bounds, strict=True)):
            if any(a < b for b, a in zip(before, after, strict=True)):
                raise ValueError(f"key frames (sink, first, last) {after} after {before}: expected none to move back")

    @property
    def query_frames(self) -> int:
        """F of the queries."""
        return self.runs[-1][1]

    @property
    def key_frames(self) -> int:
        """The least F of the keys."""
        return max(ranges[-1][1] for ranges in self.visible)

    @cached_property
    def bounds(self) -> tuple[list[int], list[int], list[int]]:
        """(sink, first, last) of every query frame: it sees key frames k < sink and first <= k < last."""
        sink, first, last = [], [], []
        for (start, stop), ranges in zip(self.runs, self.visible, strict=True):
            sink += [ranges[0][1] if len(ranges) == 2 else 0] * (stop - start)
            first += [ranges[-1][0]] * (stop - start)
            last += [ranges[-1][1]] * (stop - start)
        return sink, first, last

    def pairs(self, query_tokens: int, key_tokens: int) -> int:
        """Query-key pairs that are not masked: the count that FLOPs are taken from."""
        sink, first, last = self.bounds
        return query_tokens * key_tokens * (sum(sink) + sum(last) - sum(first))


def check_frames(q: Tensor, k: Tensor, plan: FramePlan) -> None:
    """Raise ValueError unless q [B,Fq,..] and k [B,Fk,..] have the frames of the plan."""
    if q.shape[1] != plan.query_frames or k.shape[1] < plan.key_frames:
        raise ValueError(
            f"{q.shape[1]} query and {k.shape[1]} key frames: "
            f"expected {plan.query_frames} and at least {plan.key_frames}"
        )


def _check_ranges(start: int, ranges: Sequence[FrameRange]) -> None:
    flat = [edge for pair in ranges for edge in pair]
    ordered = all(a < b for a, b in pairwise(flat))
    if not 1 <= len(ranges) <= 2 or not ordered or (len(ranges) == 2 and ranges[0][0] != 0):
        raise ValueError(
            f"query frames from {start} see {list(ranges)}: expected one range of key frames, or a first one from 0 "
            "and a later one"
        )
