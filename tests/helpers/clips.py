"""Clips written by the tests: flashes with beeps at odd frame rates, rotated and broken files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SOUND_RATE = 44_100


def flash_clip(
    path: Path,
    times: Sequence[Fraction],
    flash: int,
    *,
    start: Fraction = Fraction(0),
    sound: tuple[Fraction, Fraction] | None = (Fraction(0), Fraction(10)),
    size: tuple[int, int] = (64, 48),
) -> Fraction:
    """Black pictures at `times` (seconds after `start`), white from number `flash` on, and a tone that starts at the
    same moment. `sound` = (first, last) second of the sound stream, after `start`. Returns the moment of the flash."""
    moment = times[flash]
    rate = Fraction(len(times) - 1, 1) / (times[-1] - times[0])
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate.limit_denominator(1001), options={"bf": "2"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 90_000)
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="stereo") if sound else None
        for index, time in enumerate(times):
            picture = np.full((size[1], size[0], 3), 255 if index >= flash else 0, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 90_000), round((start + time) * 90_000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            first, last = (round(second * SOUND_RATE) for second in sound)
            n = np.arange(first, last)
            wave = np.where(n >= moment * SOUND_RATE, 0.5 * np.sin(2 * np.pi * 1000 * n / SOUND_RATE), 0)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]).astype(np.float32), "fltp", "stereo")
            frame.sample_rate, frame.time_base = SOUND_RATE, Fraction(1, SOUND_RATE)
            frame.pts = round(start * SOUND_RATE) + first
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return moment


def copy_head(source: Path, target: Path, seconds: float) -> None:
    """The first `seconds` of a file, its packets copied as they are."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams if s.type in ("video", "audio")}
        for packet in old.demux(*[old.streams[index] for index in streams]):
            if packet.dts is not None and packet.dts * packet.time_base < seconds:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)


def sidecar_json(rows: int, *, tag: str = "test-v1", identity: str = "someone", **changes: Any) -> dict[str, Any]:
    """A valid sidecar of `rows` pixel frames of a clip with a face in the middle of 160x160 pixels."""
    return {
        "format": "dualforce-sidecar",
        "version": 1,
        "identity": identity,
        "licence": "CC0-1.0",
        "fps": 25,
        "motion": {"tag": tag, "names": ["yaw", "mouth"], "values": [[k / 10, 0.5] for k in range(rows)]},
        "face_boxes": [[40.0, 40.0, 110.0, 120.0]] * rows,
        "mouth_boxes": [[60.0, 90.0, 90.0, 105.0]] * rows,
        "audio_offset_s": 0.0,
    } | changes


def write_sidecar(video: Path, content: dict[str, Any]) -> None:
    video.with_suffix(".json").write_text(json.dumps(content))


def textured(frames: int, size: int = 160, seed: int = 0) -> np.ndarray:
    """Smooth moving colours [frames,size,size,3] uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    t = np.arange(frames)[:, None, None] / 25
    waves = [np.sin(2 * np.pi * (a * x + b * y + c * t) + d) for a, b, c, d in rng.uniform(0.3, 2, (3, 4))]
    return (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def tone(frames: int, amplitude: float = 0.3) -> np.ndarray:
    """The sound [640 frames] float32 of that many pixel frames: a tone that swells and fades."""
    n = np.arange(640 * frames) / 16_000
    return (amplitude * np.sin(2 * np.pi * 220 * n) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * n))).astype(np.float32)


def write_frames(
    path: Path,
    frames: Sequence[av.VideoFrame],
    codec: str,
    rate: Fraction,
    options: dict[str, str],
    touch: Callable[[Any], None] = lambda stream: None,
) -> None:
    """A file without sound of frames as they are, at `rate`; `touch` changes the stream before encoding."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        touch(stream)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
