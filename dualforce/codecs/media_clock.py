"""Placing pictures and sound of a file on the project's clock: 25 pixel frames and 16000 samples a second.

Plain arithmetic on presentation times in exact fractions; knows nothing of decoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

from dualforce.codecs.protocols import Samples, Wave
from dualforce.types import FPS, SAMPLE_RATE

Item = TypeVar("Item")

MAX_HOLD = 60  # seconds without a new picture after which the timestamps are taken to be broken
MAX_SILENCE = 3600  # seconds without sound after which its timestamps are


class ClockError(ValueError):
    """Presentation times that cannot be real."""


class Timed(NamedTuple, Generic[Item]):
    """A picture with its presentation time and time on screen in seconds; None where the file gives none."""

    item: Item
    time: Fraction | None
    length: Fraction | None


class PlacedSound(NamedTuple):
    """Sound [N] float32 from time zero; silence before `start` seconds and in `gap` seconds of holes further on."""

    wave: Samples
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
        done = [(previous.item, range(next_index, stop))]
        previous, shown, next_index = picture, time, stop
        yield done.pop()  # so that it is not held here while it is worked on: one of 8K has 50 to 100 MB
    if previous is not None:
        end = shown + min(previous.length or interval, Fraction(MAX_HOLD))
        yield previous.item, range(next_index, max(next_index, frames_before(end - slack), 1))


def frames_before(time: Fraction) -> int:
    """Count of pixel frames k >= 0 with k / 25 < time."""
    return max(0, -((-time * FPS) // 1))


class SoundPlacer:
    """Lays runs of 16 kHz samples, each with the file time of its first sample, on one track that begins at `zero`.

    What lies before zero is cut off, holes are digital silence, as a player would give. None: zero is the first
    sample. Samples come in order of decoding: `begin` starts a run, `place` says where its next samples belong.
    """

    def __init__(self, zero: Fraction | None) -> None:
        self._zero = zero
        self._begun: Fraction | None = None  # time of a run of which no sample has come yet
        self._next = 0  # place behind the run's last sample; may lie before zero
        self._first = self._hole = 0
        self.runs = 0  # that have a sample
        self.samples = 0  # of the track, up to its last one

    @property
    def start(self) -> float:
        """Seconds of silence before the first sample."""
        return max(0, self._first) / SAMPLE_RATE

    @property
    def gap(self) -> float:
        """Seconds of holes further on."""
        return self._hole / SAMPLE_RATE

    def begin(self, time: Fraction) -> None:
        """What comes now is a run of its own, from file time `time` on."""
        self._begun = time

    def place(self, wave: Wave) -> tuple[int, Wave]:
        """(place on the track, samples) of the run's next samples [N], without those before zero. Raises ClockError
        when no sound comes for MAX_SILENCE seconds."""
        if self._begun is not None:
            self._start_run(self._begun)
            self._begun = None
        first, self._next = self._next, self._next + len(wave)
        self.samples = max(self.samples, self._next)
        return max(0, first), wave[max(0, -first) :]

    def _start_run(self, time: Fraction) -> None:
        if self._zero is None:
            self._zero = time
        first = round((time - self._zero) * SAMPLE_RATE)
        hole = max(0, first - max(self._next, 0))
        if hole > MAX_SILENCE * SAMPLE_RATE:
            raise ClockError(f"broken timestamps: no sound for {hole / SAMPLE_RATE:.0f} s")
        if self.runs:
            self._hole += hole
        else:
            self._first = first
        self._next, self.runs = first, self.runs + 1
