"""Pictures of a file on the project's clock: upright, square pixels, progressive, BT.709 colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualforce.codecs.media.colour_tags import Colours
from dualforce.codecs.media.container import MediaError, opened, stream_of, time_of
from dualforce.codecs.media.interlaced import progressive
from dualforce.codecs.media.treatment import Treatment
from dualforce.codecs.media_clock import Timed, pixel_frames_shown
from dualforce.codecs.memory import give_back_memory
from dualforce.codecs.protocols import Pixels
from dualforce.types import FPS


class SoundInfo(NamedTuple):
    """What the head of a file says of its sound: codec, samples a second and number of channels."""

    codec: str
    hz: int
    channels: int


@dataclass(frozen=True)
class MediaInfo:
    """What the head of a video file says. `zero` is the presentation time of the first picture, in seconds; `sound` is
    that of the stream that is taken, None without one."""

    width: int
    height: int
    zero: Fraction
    rate: float
    codec: str
    sound: SoundInfo | None

    def entry(self) -> dict[str, Any]:
        """As JSON, for the record of the file's samples."""
        told = {"codec": self.codec, "width": self.width, "height": self.height, "fps": round(self.rate, 4)}
        return {**told, "sound": None if self.sound is None else self.sound._asdict()}


def probe(path: Path) -> MediaInfo:
    """Size, start and streams of a video file, by decoding its first picture. Raises MediaError."""
    with opened(path) as container:
        stream = stream_of(container, "video", path)
        for frame in container.decode(stream):
            width, height = _display_size(frame, stream, None)
            if _quarter_turns(frame) % 2:
                width, height = height, width
            return MediaInfo(
                width=width,
                height=height,
                zero=time_of(frame) or Fraction(0),
                rate=float(stream.average_rate or FPS),
                codec=str(stream.codec_context.name),
                sound=_sound(container),
            )
    raise MediaError(path, "no picture could be decoded")


def _sound(container: Any) -> SoundInfo | None:
    stream = container.streams.best("audio")
    found = stream and stream.codec_context  # None also for a codec that nothing here decodes
    return SoundInfo(str(found.name), int(found.sample_rate), int(found.channels)) if found else None


def iter_frames(
    path: Path, *, max_side: int | None = None, step: int = 1, last: bool = False, treatment: Treatment | None = None
) -> Iterator[tuple[int, Pixels]]:
    """Yield (k, picture [H,W,3] uint8) for pixel frames k = 0, step, 2 step, ... at 25 frames a second.

    Pixel frame k is the source picture on screen at k / 25 s after the first one. `max_side` shrinks larger pictures;
    `last` adds the video's final pixel frame. `treatment` is told of every picture as it comes from the decoder. One
    picture is held at a time, and the decoder's memory goes back to the system at the end. Raises MediaError.
    """
    try:
        yield from _frames(path, max_side, step, last, treatment)
    finally:
        give_back_memory()


def _frames(
    path: Path, max_side: int | None, step: int, last: bool, treatment: Treatment | None
) -> Iterator[tuple[int, Pixels]]:
    with opened(path) as container:
        stream = stream_of(container, "video", path)
        colours = Colours()
        shown = False
        size: tuple[int, int] | None = None
        final: tuple[int, Any] | None = None
        for frame, indices in _on_clock(_told(container.decode(stream), stream, treatment), stream):
            size = size or _display_size(frame, stream, max_side)
            if indices and last:
                final = (indices[-1], frame)
            shown = shown or bool(indices)
            wanted = [k for k in indices if k % step == 0]
            picture = _upright(frame, size, colours) if wanted else None
            del frame  # before the picture is worked on, as the picture before the next frame: of 8K 100 MB each
            if picture is not None:
                for k in wanted:
                    yield k, picture
            del picture
        if size is None or not shown:
            raise MediaError(path, "no picture could be decoded")
        if final is not None and final[0] % step:
            yield final[0], _upright(final[1], size, colours)


def read_image(path: Path) -> Pixels:
    """The first picture of an image or video file, upright, [H,W,3] uint8. Raises MediaError."""
    return next(iter_frames(path))[1]


def _length(frame: Any) -> Fraction | None:
    return frame.duration * Fraction(frame.time_base) if frame.duration else None


def _told(frames: Iterable[Any], stream: Any, treatment: Treatment | None) -> Iterator[Any]:
    for frame in frames:
        if treatment is not None:
            treatment.add(frame, stream)
        yield frame


def _on_clock(frames: Iterable[Any], stream: Any) -> Iterator[tuple[Any, range]]:
    """Pair each decoded frame with the pixel frames during which it is on screen."""
    pictures = (Timed(frame, time_of(frame), _length(frame)) for frame in frames)
    interval = 1 / Fraction(stream.average_rate or FPS)
    return pixel_frames_shown(progressive(pictures), interval, Fraction(stream.time_base))


def _display_size(frame: Any, stream: Any, max_side: int | None) -> tuple[int, int]:
    """(width, height) with square pixels, before rotation, shrunk to `max_side`."""
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    width, height = Fraction(frame.width) * (ratio if ratio > 0 else 1), Fraction(frame.height)
    shrink = min(Fraction(1), Fraction(max_side) / max(width, height)) if max_side else Fraction(1)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _quarter_turns(frame: Any) -> int:
    return round(frame.rotation / 90) % 4


def _upright(frame: Any, size: tuple[int, int], colours: Colours) -> Pixels:
    """RGB picture of a decoded frame at `size` (before rotation), turned upright."""
    picture = colours.picture(frame, size)
    turns = _quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
