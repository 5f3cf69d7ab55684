"""Placing pictures and sound of a file on the project's clock: 25 pixel frames and 16000 samples a second.

Plain arithmetic on presentation times in exact fractions; knows nothing of decoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from dualforce.codecs.protocols import Wave
from dualforce.types import FPS, SAMPLE_RATE

Item = TypeVar("Item")

MAX_HOLD = 60  # seconds without a new picture after which the timestamps are taken to be broken


class ClockError(ValueError):
    """Presentation times that cannot be real."""


class Timed(NamedTuple, Generic[Item]):
    """A picture with its presentation time and time on screen in seconds; None where the file gives none."""

    item: Item
    time: Fraction | None
    length: Fraction | None


class PlacedSound(NamedTuple):
    """Sound [N] float32 from time zero; silence before `start` seconds and in `gap` seconds of holes further on."""

    wave: Wave
    start: float
    gap: float


def pixel_frames_shown(
    pictures: Iterable[Timed[Item]], interval: Fraction, tick: Fraction
) -> Iterator[tuple[Item, range]]:
    """Pair each picture with the pixel frames k during which it is on screen: k / 25 in [its time, the next one's).

    Time zero is the first picture's. `interval` is the usual distance of two pictures, used where times are missing;
    `tick` is the file's time unit. Pictures whose time does not advance are dropped. Raises ClockError when no picture
    comes for MAX_HOLD seconds.
    """
    # Containers round times to their own tick (1 ms in Matroska): half a tick early still counts as on time.
    slack = min(tick / 2, Fraction(1, 1000))
    zero = shown = Fraction(0)
    previous: Timed[Item] | None = None
    next_index = 0
    for picture in pictures:
        if previous is None:
            zero, previous = picture.time or Fraction(0), picture
            continue
        time = shown + interval if picture.time is None else picture.time - zero
        if time <= shown:
            continue
        if time - shown > MAX_HOLD:
            raise ClockError(f"broken timestamps: no picture for {float(time - shown):.0f} s")
        stop = max(next_index, frames_before(time - slack))
        yield previous.item, range(next_index, stop)
        previous, shown, next_index = picture, time, stop
    if previous is not None:
        end = shown + min(previous.length or interval, Fraction(MAX_HOLD))
        yield previous.item, range(next_index, max(next_index, frames_before(end - slack), 1))


def frames_before(time: Fraction) -> int:
    """Count of pixel frames k >= 0 with k / 25 < time."""
    return max(0, -((-time * FPS) // 1))


def place_sound(blocks: list[tuple[Fraction, Wave]], zero: Fraction | None) -> PlacedSound:
    """Lay runs of 16 kHz samples, each with the file time of its first sample, on one track that begins at `zero`.

    What lies before zero is cut off, holes are digital silence, as a player would give. None: zero is the first
    sample.
    """
    origin = blocks[0][0] if zero is None else zero
    starts = [round((time - origin) * SAMPLE_RATE) for time, _ in blocks]
    ends = [start + len(wave) for start, (_, wave) in zip(starts, blocks, strict=True)]
    track = np.zeros(max(0, *ends), np.float32)
    for start, end, (_, wave) in zip(starts, ends, blocks, strict=True):
        if end > 0:
            track[max(start, 0) : end] = wave[max(0, -start) :]
    gap = sum(max(0, after - max(before, 0)) for before, after in zip(ends, starts[1:], strict=False))
    return PlacedSound(track, max(0, starts[0]) / SAMPLE_RATE, gap / SAMPLE_RATE)
