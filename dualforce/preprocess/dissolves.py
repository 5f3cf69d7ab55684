"""Dissolves: one shot fading into the next while both are seen. Part of stage 1.

In a linear dissolve from shot A to shot B picture t of n is (1 - t/n) A + (t/n) B. Where neither shot moves, mostly in
the background, the picture lies near that line; where something moves within one shot, it leaves the line at once. So
spans of several lengths are looked at in small grey pictures, block by block: how many blocks differ much between the
two ends and stay near the line in between? In one shot that moves few do. Light that changes does the same to all of
the picture, but its edges stay where they are: the gradients of the ends are then alike, which those of two shots are
not. Colours and other curves than the straight one are not looked at.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dualforce.codecs.protocols import Pixels

SIDE = 64  # grey pictures are shrunk to this, whatever their shape,
BLOCK = 8  # and looked at in blocks of this side
# Pixel frames from end to end: dissolves of 0.2 to 2 s; longer ones in part.
SPANS = (6, 8, 10, 13, 17, 22, 28, 36, 45, 51)
CHANGE = 20.0  # a block changes by at least this much from end to end, root mean square, 0 to 255,
OFF = ((13, 0.12), (22, 0.14), (51, 0.16))  # and is off the line by less than this share of it, in spans up to so many
ALIKE = 0.5  # correlation of the gradients of the ends, from which on they show one shot; two shots: mostly below 0.3
LIT_ALIKE = 0.75  # the same for the grey values; two shots: mostly below 0.6
UNEVEN = 6.0  # ratio of the squared contrasts of the ends, above which one is a plain colour; two shots: mostly below 4
FLAT = 0.7  # square of the contrast half way, as a share of the mean of both ends', below which it is of two shots
SURE = 9 / 64  # of the blocks, for a dissolve; in real and rendered clips without one it is 3 / 64 at most
NEAR = 4 / 64  # for a span that overlaps with it to be part of it: itself, not what overlaps with that in turn
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601

Blocks = NDArray[np.float32]


class _Dissolve(NamedTuple):
    """Pictures [start, stop) of spans that are sure, and [first, last) with those that overlap with them."""

    start: int
    stop: int
    first: int
    last: int


class Dissolves:
    """Looks at the pictures of a video one after the other; holds some 50 small ones."""

    def __init__(self) -> None:
        self._recent: deque[Blocks] = deque(maxlen=SPANS[-1] + 1)
        self._count = 0
        self._near: deque[tuple[int, int]] = deque()  # pictures [start, stop) of spans that may be part of the next one
        self._found: list[_Dissolve] = []  # apart from each other

    def add(self, picture: Pixels) -> None:
        """The next picture [H,W,3] uint8."""
        self._recent.append(_blocks(picture))
        self._count += 1
        recent = list(self._recent)
        for span in SPANS:
            if span < len(recent):
                share = _share(recent[-span - 1 :])
                if share >= NEAR:
                    self._note(self._count - 1 - span, share >= SURE and _is_of_two_shots(recent[-span - 1 :]))

    def add_black(self) -> None:
        """The next picture is black: what fades into it or out of it is no dissolve."""
        self._recent.clear()
        self._count += 1

    def parts(self) -> list[tuple[int, int]]:
        """Pictures [start, stop) of each dissolve so far, with some on either side, in order and apart."""
        parts: list[tuple[int, int]] = []
        for one in self._found:
            joined = bool(parts) and one.first < parts[-1][1]
            start = min(one.first, parts.pop()[0]) if joined else one.first
            parts.append((start, one.last))
        return parts

    def _note(self, start: int, sure: bool) -> None:
        """A span that ends with the latest picture."""
        self._near.append((start, self._count))
        while self._near[0][1] < self._count - SPANS[-1]:
            self._near.popleft()
        first = start
        if sure:
            while self._found and start < self._found[-1].stop:
                before = self._found.pop()
                start, first = min(start, before.start), min(first, before.first)
            first = min([first, *(one for one, stop in self._near if stop > start)])
            self._found.append(_Dissolve(start, self._count, first, self._count))
        elif self._found and start < self._found[-1].stop:
            before = self._found[-1]
            self._found[-1] = before._replace(first=min(first, before.first), last=self._count)


def _blocks(picture: Pixels) -> Blocks:
    """Grey values [64,64] float32 of the blocks, row by row, and in each of its pixels."""
    grey = torch.from_numpy(picture @ GREY)
    small = torch.nn.functional.interpolate(grey[None, None], (SIDE, SIDE), mode="area")[0, 0].numpy()
    split = small.reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3).reshape(-1, BLOCK * BLOCK))


def _share(span: list[Blocks]) -> float:
    """Share of the blocks that go straight from one end of the span to the other end, which shows something else."""
    first, last = span[0], span[-1]
    way = last - first
    length = np.einsum("bp,bp->b", way, way) / way.shape[1]
    moved = np.flatnonzero(length > CHANGE**2)
    if len(moved) < NEAR * len(first) or _correlation(_gradients(first), _gradients(last)) >= ALIKE:
        return 0.0
    steps = len(span) - 1
    off = np.zeros(len(moved), np.float32)
    for place, blocks in enumerate(span[1:-1], start=1):
        off += np.square(blocks[moved] - first[moved] - np.float32(place / steps) * way[moved]).mean(axis=1)
    most = next(share for longest, share in OFF if steps <= longest)
    return float(np.count_nonzero(off / (steps - 1) < most**2 * length[moved])) / len(first)


def _is_of_two_shots(span: list[Blocks]) -> bool:
    """Whether the contrast is as between two shots.

    Of the squares of two contrasts that have nothing in common half is left half way, whatever moves in them; what
    moves within one shot keeps its own. A shot that fades into one colour, or out of it, keeps its bright and dark
    parts, and nearly all contrast is at one end.
    """
    first, half, last = (float(np.square(_gradients(span[place])).sum()) for place in (0, len(span) // 2, -1))
    balanced = max(first, last) <= UNEVEN * min(first, last)
    lit_alike = _correlation((span[0] - span[0].mean()).ravel(), (span[-1] - span[-1].mean()).ravel()) >= LIT_ALIKE
    return balanced and half < FLAT * (first + last) / 2 and not lit_alike


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of two rows of numbers around 0; 1 where one of them is nothing but 0."""
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size > 0 else 1.0


def _gradients(blocks: Blocks) -> NDArray[np.float32]:
    """Differences of neighbours within blocks."""
    pixels = blocks.reshape(-1, BLOCK, BLOCK)
    return np.concatenate([np.diff(pixels, axis=2).ravel(), np.diff(pixels, axis=1).ravel()])
