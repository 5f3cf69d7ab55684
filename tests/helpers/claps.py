"""Clips of claps with flashes, and how far picture and sound are apart when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from dualforce.codecs.media import iter_frames, probe, read_sound

FLASH = Fraction(1, 10)  # seconds that a flash lasts, at least


def clap_clip(
    path: Path, times: Sequence[Fraction], claps: Sequence[int], *, hz: int, codec: str, start: Fraction = Fraction(0)
) -> None:
    """Dark pictures at `times` (seconds after `start` of the file), bright from each of the pictures `claps` on for
    FLASH seconds; a click begins when the first bright picture is shown. H.264 with B-frames."""
    rate = Fraction(len(times) - 1) / (times[-1] - times[0])
    bright = {n for clap in claps for n, time in enumerate(times) if times[clap] <= time < times[clap] + FLASH}
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "bf": "2", "b_strategy": "0"}
        video = container.add_stream("libx264", rate=rate.limit_denominator(1001), options=options)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.time_base = Fraction(1, 90_000)
        audio = container.add_stream(codec, rate=hz, layout="stereo")
        for number, time in enumerate(times):
            picture = np.full((48, 64, 3), 235 if number in bright else 16, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 90_000), round((start + time) * 90_000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        wave = np.zeros(round((times[-1] + 1) * hz), np.float32)
        for clap in claps:
            first = math.ceil(times[clap] * hz)
            since = (np.arange(first, first + hz // 50) - float(times[clap] * hz)) / hz
            wave[first : first + hz // 50] = 0.8 * np.exp(-since / 0.005) * np.sin(2 * np.pi * 1500 * since)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
        frame.sample_rate, frame.time_base, frame.pts = hz, Fraction(1, hz), round(start * hz)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


class Offset(NamedTuple):
    """Seconds. `picture` is the mean shift of the picture's clock against the truth, `sound` of the sound's; `apart` is
    the largest distance between a click as heard and the flash as shown, less what the 25 fps grid costs."""

    picture: float
    sound: float
    apart: float


def measure(path: Path, times: Sequence[Fraction], claps: Sequence[int]) -> Offset:
    """Read a clip as the builder does and compare it with the truth.

    A picture shown at t appears in pixel frame ceil(25 t): up to 40 ms later, and exactly known. Less that delay, the
    first bright pixel frame tells the time of the flash. A clock that is off by less than a pixel frame moves some
    flashes by one frame and others not; over flashes at many phases of the grid the mean shift is the clock's offset.
    """
    level = np.array([picture.mean() for _, picture in iter_frames(path)])
    shown = np.flatnonzero(np.diff((level > 128).astype(int)) == 1) + 1
    sound = read_sound(path, probe(path).zero)
    assert sound is not None and len(shown) == len(claps), (len(shown), len(claps))
    picture_error, sound_error = [], []
    for clap, frame in zip(claps, shown, strict=True):
        truth = float(times[clap])
        delay = math.ceil(times[clap] * 25 - Fraction(1, 1000)) / 25 - truth  # containers round to a millisecond
        picture_error.append(frame / 25 - delay - truth)
        first = round((truth - 0.1) * 16_000)
        near = np.abs(sound.wave[first : first + 3600])
        sound_error.append((first + int(np.argmax(near > 0.25 * near.max()))) / 16_000 - truth)
    picture, heard = np.array(picture_error), np.array(sound_error)
    return Offset(float(picture.mean()), float(heard.mean()), float(np.abs(heard - picture).max()))
