"""Writing videos, and pictures for people to look at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dualforce.codecs.media.container import MediaError, opened
from dualforce.codecs.protocols import Pixels, Wave
from dualforce.types import FPS, SAMPLE_RATE


def write_video(path: Path, frames: Iterable[Pixels], wave: Wave | None, *, crf: int = 18) -> int:
    """Write an mp4 (H.264 yuv420p at 25 frames a second; AAC mono at 16 kHz when `wave` is given).

    `frames` yields uint8 [H,W,3] with even H and W and may be a generator: pictures are encoded as they come. The file
    appears under its name only when it is complete. Returns the number of pictures. Raises MediaError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with opened(partial, "w", name=path) as container:
            count = _encode(container, path, iter(frames), wave, crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def encode_jpeg(picture: Pixels) -> bytes:
    """A picture [H,W,3] uint8 as JPEG, for people to look at."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuvj420p")
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuvj420p"
    encoder.time_base = Fraction(1, FPS)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def _encode(container: Any, path: Path, frames: Iterator[Pixels], wave: Wave | None, crf: int) -> int:
    import av

    first = next(frames, None)
    if first is None:
        raise MediaError(path, "no pictures to write")
    height, width = _checked(first, None, path).shape[:2]
    video = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "medium"})
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    audio = None
    if wave is not None:
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
    count = heard = 0
    picture: Pixels | None = first
    while picture is not None:
        frame = av.VideoFrame.from_ndarray(_checked(picture, (height, width), path), format="rgb24")
        frame.pts, frame.time_base = count, Fraction(1, FPS)
        container.mux(video.encode(frame))
        count += 1
        if audio is not None and wave is not None:
            heard = _encode_sound(container, audio, wave, heard, count * SAMPLE_RATE // FPS)
        picture = next(frames, None)
    if audio is not None and wave is not None:
        _encode_sound(container, audio, wave, heard, len(wave))
        container.mux(audio.encode(None))
    container.mux(video.encode(None))
    return count


def _encode_sound(container: Any, stream: Any, wave: Wave, start: int, stop: int) -> int:
    """Encode samples [start, stop) of `wave`, as far as it goes; returns where it stopped."""
    import av

    stop = min(stop, len(wave))
    if stop > start:
        block = np.ascontiguousarray(wave[None, start:stop], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
    return max(start, stop)


def _checked(picture: Pixels, size: tuple[int, int] | None, path: Path) -> Pixels:
    """The picture, contiguous; raises MediaError unless it is uint8 [H,W,3] with even sides, `size` if given."""
    height, width, colours = picture.shape if picture.ndim == 3 else (1, 1, 0)
    right = picture.dtype == np.uint8 and colours == 3 and height % 2 == width % 2 == 0
    if not right or (size is not None and (height, width) != size):
        wanted = f"{size[0]}x{size[1]}" if size else "even height and width"
        raise MediaError(path, f"picture {picture.shape} {picture.dtype}: expected uint8 [H,W,3], {wanted}")
    return np.ascontiguousarray(picture)
