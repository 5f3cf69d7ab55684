"""Placing pictures and sound on the clock, as arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualforce.codecs.media_clock import ClockError, PlacedSound, SoundPlacer, Timed, frames_before, pixel_frames_shown

TICK = Fraction(1, 90_000)
INTERVAL = Fraction(1, 25)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40), st.integers(-5000, 5000))
def test_every_pixel_frame_once_and_from_the_right_picture(steps: list[int], start: int) -> None:
    ticks = np.cumsum([start, *steps])
    pictures = [Timed(k, int(t) * TICK, None) for k, t in enumerate(ticks)]
    shown = [(k, item) for item, indices in pixel_frames_shown(pictures, INTERVAL, TICK) for k in indices]
    assert [k for k, _ in shown] == list(range(len(shown)))
    for k, item in shown:
        now = start * TICK + Fraction(k, 25)
        latest = max((n for n, t in enumerate(ticks) if int(t) * TICK <= now + TICK / 2), default=0)
        assert item == latest
    total = (int(ticks[-1]) - start) * TICK + INTERVAL
    assert len(shown) == frames_before(total - TICK / 2)


def test_missing_times_follow_the_frame_rate() -> None:
    pictures = [Timed(k, None, None) for k in range(10)]
    shown = list(pixel_frames_shown(pictures, Fraction(1, 50), TICK))
    assert [len(indices) for _, indices in shown] == [1, 0] * 5


def test_backward_times_are_dropped_and_jumps_refused() -> None:
    pictures = [Timed("a", Fraction(0), None), Timed("b", Fraction(-1), None), Timed("c", Fraction(1, 25), None)]
    assert [item for item, _ in pixel_frames_shown(pictures, INTERVAL, TICK)] == ["a", "c"]
    broken = [Timed("a", Fraction(0), None), Timed("b", Fraction(10**6), None)]
    with pytest.raises(ClockError, match="no picture for 1000000 s"):
        list(pixel_frames_shown(broken, INTERVAL, TICK))


def test_one_picture_is_one_frame() -> None:
    assert list(pixel_frames_shown([Timed("a", None, None)], INTERVAL, TICK)) == [("a", range(1))]


def place_sound(runs: list[tuple[Fraction, np.ndarray]], zero: Fraction | None) -> PlacedSound:
    """The track of whole runs, each given in three pieces."""
    placer, parts = SoundPlacer(zero), []
    for time, wave in runs:
        placer.begin(time)
        parts += [placer.place(piece) for piece in np.array_split(wave, 3)]
    track = np.zeros(placer.samples, np.float32)
    for place, wave in parts:
        track[place : place + len(wave)] = wave
    return PlacedSound(track, placer.start, placer.gap)


def test_sound_before_zero_is_cut_and_holes_stay() -> None:
    one = np.ones(16_000, np.float32)
    blocks = [(Fraction(-2), one), (Fraction(-1, 2), one), (Fraction(1), one)]
    placed = place_sound(blocks, Fraction(0))
    assert len(placed.wave) == 32_000
    assert placed.wave[:8000].all() and not placed.wave[8000:16_000].any() and placed.wave[16_000:].all()
    assert placed.start == 0 and placed.gap == 0.5
    late = place_sound([(Fraction(3, 2), one)], Fraction(1))
    assert late.start == 0.5 and not late.wave[:8000].any() and len(late.wave) == 24_000
    assert len(place_sound([(Fraction(3), one)], None).wave) == 16_000
    assert len(place_sound([(Fraction(-3), one)], Fraction(0)).wave) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-40_000, 40_000), st.integers(1, 9000)), min_size=1, max_size=6),
    st.sampled_from([None, Fraction(0), Fraction(1, 3), Fraction(-1, 2)]),
)
def test_runs_lie_where_their_times_say(runs: list[tuple[int, int]], zero: Fraction | None) -> None:
    """Also where they overlap, a later one then counts, or go back in time; compared with whole arrays."""
    waves = [np.full(count, number + 1, np.float32) for number, (_, count) in enumerate(runs)]
    times = [Fraction(start, 16_000) for start, _ in runs]
    placed = place_sound(list(zip(times, waves, strict=True)), zero)
    starts = [round((time - (times[0] if zero is None else zero)) * 16_000) for time in times]
    ends = [start + len(wave) for start, wave in zip(starts, waves, strict=True)]
    track = np.zeros(max(0, *ends) if len(ends) > 1 else max(0, ends[0]), np.float32)
    for start, end, wave in zip(starts, ends, waves, strict=True):
        if end > 0:
            track[max(start, 0) : end] = wave[max(0, -start) :]
    assert np.array_equal(placed.wave, track)
    assert placed.start == max(0, starts[0]) / 16_000
    holes = [max(0, start - max(end, 0)) for end, start in zip(ends, starts[1:], strict=False)]
    assert placed.gap == sum(holes) / 16_000


def test_sound_that_stays_away_for_hours_is_refused() -> None:
    one = np.ones(16_000, np.float32)
    assert place_sound([(Fraction(0), one), (Fraction(3600), one)], Fraction(0)).gap == 3599
    for first in (Fraction(0), Fraction(-(10**7))):
        with pytest.raises(ClockError, match="no sound for 1000000"):
            place_sound([(first, one), (Fraction(10**6) + max(0, first + 1), one)], Fraction(0))
