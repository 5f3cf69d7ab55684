"""Odd, damaged and hostile videos, made with PyAV: what a folder from the internet holds."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

FRAMES = 85
SIZE = (64, 64)
FAST = {"preset": "ultrafast", "bf": "2", "b_strategy": "0", "g": "24"}


def make(
    path: Path,
    *,
    count: int = FRAMES,
    times: Sequence[Fraction] | None = None,
    rate: Fraction = Fraction(25),
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    sound: str | None = "aac",
    hz: int = 44_100,
    layout: str = "stereo",
    seconds: tuple[float, float] | None = None,
    gain: float = 0.3,
    wave: Callable[[np.ndarray], np.ndarray] | None = None,
    start: Fraction = Fraction(0),
    streams: tuple[int, int] = (1, 1),
    container: dict[str, str] | None = None,
    touch: Callable[[Any], None] = lambda stream: None,
    format: str | None = None,
) -> None:
    """Moving colours with a tone. `times`: presentation times, else at `rate`; `seconds`: (first, last) of the sound;
    `streams`: how many of pictures and of sound; `touch` changes the stream before encoding."""
    moments = list(times) if times is not None else [k / rate for k in range(count)]
    seconds = seconds or (0.0, float(moments[-1] + 1 / rate) + 0.2)
    with av.open(str(path), "w", format=format, options=container or {}) as file:
        chosen = FAST if codec == "libx264" else {}
        videos = [file.add_stream(codec, rate=rate.limit_denominator(1001), options={**chosen, **(options or {})})
                  for _ in range(streams[0])]  # fmt: skip
        fixed = codec in ("mpeg4", "mpeg2video", "mjpeg", "wmv2", "flv", "gif")  # these encoders want their rate
        base = 1 / rate if fixed else Fraction(1, 90_000)
        for video in videos:
            video.width, video.height, video.pix_fmt = *size, pix_fmt
            video.codec_context.time_base, video.codec_context.bit_rate = base, 2_000_000
            touch(video)
        audios = [file.add_stream(sound, rate=hz, layout=layout) for _ in range(streams[1])] if sound else []
        for moment in moments:
            frame = av.VideoFrame.from_ndarray(moving(float(moment)), format="rgb24")
            frame = frame.reformat(width=size[0], height=size[1], format=pix_fmt)
            frame.time_base, frame.pts = base, round((start + moment) / base)
            for video in videos:
                file.mux(video.encode(frame))
        for video in videos:
            file.mux(video.encode(None))
        for audio in audios:
            _encode_tone(file, audio, hz, layout, seconds, gain, wave, start)


def moving(second: float) -> np.ndarray:
    """[64,64,3] uint8: soft colours that drift slowly with time."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]] / SIZE[0]
    waves = [np.sin(2 * np.pi * (a * x + b * y + 0.1 * second) + a) for a, b in ((1.0, 0.5), (0.4, 1.3), (0.8, 0.9))]
    return (127.5 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def _encode_tone(
    file: Any, audio: Any, hz: int, layout: str, seconds: tuple[float, float], gain: float, wave: Any, start: Fraction
) -> None:
    n = np.arange(round(seconds[0] * hz), round(seconds[1] * hz))
    mono = (gain * np.sin(2 * np.pi * 220 * n / hz)).astype(np.float32)
    mono = wave(mono) if wave else mono
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono[None].repeat(channels, 0)), "fltp", layout)
    frame.sample_rate, frame.time_base = hz, Fraction(1, hz)
    frame.pts = round(start * hz) + int(n[0]) if len(n) else 0
    resampler = av.AudioResampler(
        audio.codec_context.format, layout, hz, frame_size=audio.codec_context.frame_size or 1024
    )
    for part in [] if not len(n) else [*resampler.resample(frame), *resampler.resample(None)]:
        file.mux(audio.encode(part))
    file.mux(audio.encode(None))


def damaged(make_file: Callable[[Path], None], change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    """The file of `make_file` with its bytes changed."""

    def damage(path: Path) -> None:
        make_file(path)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return damage


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def holes(data: bytearray, *, every: int, begin: float = 0.3) -> bytes:
    """Every so many bytes one is inverted, from the given share of the file on."""
    for place in range(int(len(data) * begin), len(data), every):
        data[place] ^= 0xFF
    return bytes(data)


def huge_gif(side: int) -> bytes:
    """A header that promises side x side pixels, and one pixel."""
    screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + bytes([2, 2, 0x44, 1, 0]) + b";"


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("video.mp4", b"x" * 1000)
    return target.getvalue()


def two_sizes(path: Path) -> None:
    """One transport stream, its pictures grow in the middle."""
    parts = []
    for number, size in enumerate(((64, 64), (96, 96))):
        part = path.with_name(f"part{number}.ts")
        make(part, size=size, start=Fraction(FRAMES * number, 25), seconds=(0.0, 3.4))
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def two_sounds_in_turn(path: Path) -> None:
    """One transport stream, its sound changes from stereo at 44.1 kHz to mono at 48 kHz."""
    parts = []
    for number, (hz, layout) in enumerate(((44_100, "stereo"), (48_000, "mono"))):
        part = path.with_name(f"part{number}.ts")
        make(part, hz=hz, layout=layout, start=Fraction(FRAMES * number, 25), seconds=(0.0, 3.4))
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def without_first_key_frame(path: Path) -> None:
    whole = path.with_name("whole.mkv")
    make(whole)
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        streams = [new.add_stream_from_template(stream) for stream in old.streams]
        dropped = False
        for packet in old.demux():
            if packet.dts is None or (packet.stream.type == "video" and not dropped):
                dropped = dropped or packet.stream.type == "video"
                continue
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    whole.unlink()


def rotated(degrees: int) -> Callable[[Any], None]:
    return lambda stream: stream.set_display_rotation(degrees)


def wide_pixels(stream: Any) -> None:
    stream.sample_aspect_ratio = Fraction(2, 1)


def hdr(stream: Any) -> None:
    context = stream.codec_context
    context.color_primaries, context.color_trc, context.colorspace = 9, 16, 9  # BT.2020, PQ


def full_range(stream: Any) -> None:
    stream.codec_context.color_range = 2


def nan_sound(wave: np.ndarray) -> np.ndarray:
    wave[1000:1010] = np.nan
    return wave


def varying() -> list[Fraction]:
    steps = np.random.default_rng(5).integers(10, 75, 80)
    return [Fraction(int(ms), 1000) for ms in np.concatenate([[0], np.cumsum(steps)])]


def with_gap(seconds: int) -> list[Fraction]:
    return [Fraction(k, 25) + (seconds if k >= 84 else 0) for k in range(FRAMES + 85)]


class Case(NamedTuple):
    """A file name, how it is made, how it may end ("used" or a reason), and whether it is for the slow suite."""

    name: str
    make: Callable[[Path], None]
    ends: tuple[str, ...]
    slow: bool = False


def video(name: str, *ends: str, slow: bool = False, **options: Any) -> Case:
    return Case(name, lambda path: make(path, **options), ends or ("used",), slow)
