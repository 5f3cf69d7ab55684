"""Clips whose pictures tell their number and where they were cropped: truth for cutting tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (192, 144)  # width, height
CELL = 8  # pixels; a bit of the number is one cell
BITS = 10
SOUND_RATE = 44_100


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H,W,3] uint8: a texture that is nowhere like itself, and in the middle the number as a row of cells."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    base = 96 + 60 * np.sin(x * x / 900 + y / 7) * np.cos(y * y / 1100 - x / 9)
    image = np.repeat(base[..., None], 3, axis=2).astype(np.uint8)
    top, left = number_place(size)
    for bit in range(BITS):
        image[top : top + CELL, left + bit * CELL : left + (bit + 1) * CELL] = 235 if number >> bit & 1 else 16
    return image


def number_place(size: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the first cell, both even."""
    return size[1] // 4 * 2 - CELL // 2, size[0] // 4 * 2 - BITS * CELL // 2


def number_in(image: np.ndarray, top: int, left: int) -> int:
    """The number in a picture [H,W,...] whose first cell is at (top, left)."""
    cells = [
        image[top + 2 : top + CELL - 2, left + bit * CELL + 2 : left + (bit + 1) * CELL - 2] for bit in range(BITS)
    ]
    return sum(1 << bit for bit, cell in enumerate(cells) if cell.mean() > 128)


def numbered_clip(
    path: Path,
    count: int,
    *,
    rate: Fraction = Fraction(25),
    first: int = 0,
    beep: Fraction | None = None,
    sound: tuple[Fraction, Fraction] | None = (Fraction(0), Fraction(1000)),
    size: tuple[int, int] = SIZE,
    missing: range = range(0),
    pix_fmt: str = "yuv420p",
    codec: tuple[str, str] = ("libx264", "aac"),
) -> Path:
    """`count` pictures numbered from `first` at k / rate seconds, without those in `missing`. The sound is silent up to
    second `beep`, then a tone; it lasts from `sound[0]` to `sound[1]`, at most as long as the pictures."""
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "12", "bf": "2"} if codec[0] == "libx264" else {"cpu-used": "8"}
        video = container.add_stream(codec[0], rate=rate, options=options)
        video.width, video.height, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base = Fraction(1, 90_000)
        audio = container.add_stream(codec[1], rate=48_000 if codec[1] == "libopus" else SOUND_RATE, layout="stereo")
        for k in range(count):
            if k in missing:
                continue
            frame = av.VideoFrame.from_ndarray(picture(first + k, size), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 90_000), round(k / rate * 90_000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            hz = audio.rate
            n = np.arange(round(sound[0] * hz), round(min(sound[1], count / rate) * hz))
            loud = n >= (beep * hz if beep is not None else 0)
            wave = np.where(loud, 0.5 * np.sin(2 * np.pi * 1000 * n / hz), 0).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
            frame.sample_rate, frame.time_base, frame.pts = hz, Fraction(1, hz), int(n[0])
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def pictures_of(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(presentation time in seconds, brightness [H,W] uint8) of every picture of a file."""
    with av.open(str(path)) as container:
        return [(f.pts * f.time_base, f.to_ndarray(format="gray")) for f in container.decode(video=0)]
