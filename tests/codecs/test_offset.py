"""Picture and sound stay together to 10 ms at every frame rate, through the real decoder."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers.claps import Offset, clap_clip, measure

from dualforce.codecs import media_clock

MOST = 0.010
RATES = {
    "23.976": Fraction(24_000, 1001),
    "25": Fraction(25),
    "29.97": Fraction(30_000, 1001),
    "30": Fraction(30),
    "50": Fraction(50),
    "60": Fraction(60),
}
FILES = {"mp4": ("aac", 44_100), "mkv": ("aac", 48_000), "mov": ("pcm_s16le", 48_000)}


def picture_times(rate: str, seconds: int = 12) -> list[Fraction]:
    """Presentation times of a rate, or of 15 to 70 ms from picture to picture."""
    if rate != "variable":
        return [k / RATES[rate] for k in range(int(seconds * RATES[rate]))]
    steps = np.random.default_rng(7).integers(15, 70, 1000)
    times = np.concatenate([[0], np.cumsum(steps)])
    return [Fraction(int(time), 1000) for time in times if time < seconds * 1000]


def claps_in(times: list[Fraction]) -> list[int]:
    """Pictures about 0.31 to 0.45 s apart, at irregular distances."""
    rng, found, now = np.random.default_rng(3), [], 0.3
    while now < times[-1] - 1:
        found.append(next(n for n, time in enumerate(times) if time >= now))
        now = float(times[found[-1]]) + rng.uniform(0.31, 0.45)
    return found


def measured(rate: str, path: Path, start: Fraction = Fraction(0)) -> Offset:
    times = picture_times(rate)
    claps = claps_in(times)
    assert len(claps) > 20
    codec, hz = FILES[path.suffix[1:]]
    clap_clip(path, times, claps, hz=hz, codec=codec, start=start)
    zero = next(time for time in times if start + time >= 0)  # the first picture that is shown
    return measure(path, [time - zero for time in times], [clap for clap in claps if times[clap] > zero])


@pytest.mark.parametrize("rate", [*RATES, "variable"])
@pytest.mark.parametrize("suffix", ["mp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mkv", "mov"))])
def test_picture_and_sound_stay_together(rate: str, suffix: str, tmp_path: Path) -> None:
    found = measured(rate, tmp_path / f"clip.{suffix}")
    shown = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in found._asdict().items())
    print(f"\n{rate} {suffix}: {shown}")
    assert abs(found.sound - found.picture) <= MOST
    assert found.apart <= MOST  # of each single clap


@pytest.mark.parametrize(
    ("start", "suffix"), [(Fraction(7, 10), "mkv"), (Fraction(1000), "mp4"), (Fraction(-1, 2), "mp4")]
)
def test_time_zero_is_the_first_picture(start: Fraction, suffix: str, tmp_path: Path) -> None:
    """Also where an edit list hides half a second of pictures and sound."""
    assert measured("29.97", tmp_path / f"clip.{suffix}", start).apart <= MOST


@pytest.mark.parametrize("rate", ["29.97", "variable"])
@pytest.mark.parametrize("milliseconds", [-15, 15])
def test_a_wrong_clock_is_measured(
    rate: str, milliseconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure itself: pictures that come 15 ms late or early are found out, though the grid is 40 ms."""
    right = media_clock.frames_before
    monkeypatch.setattr(media_clock, "frames_before", lambda time: right(time + Fraction(milliseconds, 1000)))
    found = measured(rate, tmp_path / "clip.mp4")
    assert found.picture * 1000 == pytest.approx(milliseconds, abs=8)
    assert found.apart > MOST
