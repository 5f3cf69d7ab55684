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
from dualforce.codecs.media.interlaced import check_whole, progressive
from dualforce.codecs.media.treatment import Treatment
from dualforce.codecs.media_clock import Timed, frames_before, pixel_frames_shown
from dualforce.codecs.memory import give_back_memory
from dualforce.codecs.protocols import Pixels
from dualforce.types import FPS

LARGE = 2**24  # pixels: of frames this large one more or less is 50 to 100 MB


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
            check_whole(frame, stream.codec_context.name)
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
        shown = False
        final: tuple[int, _Held] | None = None
        for held, indices in _on_clock(container.decode(stream), stream, _Uprighter(stream, max_side), step, treatment):
            shown = shown or bool(indices)
            if indices and last:
                final = (indices[-1], held)
            wanted = [k for k in indices if k % step == 0]
            if wanted:
                picture = [held.take(again=last and indices[-1] % step != 0)]
                for k in wanted[:-1]:
                    yield k, picture[0]
                yield wanted[-1], picture.pop()  # so that it is not held here while it is worked on
        if not shown:
            raise MediaError(path, "no picture could be decoded")
        if final is not None and final[0] % step:
            yield final[0], final[1].take()


def read_image(path: Path) -> Pixels:
    """The first picture of an image or video file, upright, [H,W,3] uint8. Raises MediaError."""
    return next(iter_frames(path))[1]


def _on_clock(
    frames: Iterable[Any], stream: Any, uprighter: _Uprighter, step: int, treatment: Treatment | None
) -> Iterator[tuple[_Held, range]]:
    """Pair each decoded frame with the pixel frames during which it is on screen; those in multiples of `step` are
    wanted."""

    def timed(frame: Any) -> Timed[Any]:
        check_whole(frame, stream.codec_context.name)
        if treatment is not None:
            treatment.add(frame, stream)
        return Timed(frame, time_of(frame), frame.duration * Fraction(frame.time_base) if frame.duration else None)

    interval = 1 / Fraction(stream.average_rate or FPS)
    pictures = progressive(map(timed, frames))  # map, not a generator: that would hold a frame
    return pixel_frames_shown(_held(pictures, uprighter, interval, step), interval, Fraction(stream.time_base))


def _held(
    pictures: Iterator[Timed[Any]], uprighter: _Uprighter, interval: Fraction, step: int
) -> Iterator[Timed[_Held]]:
    """Frames to be kept until the time of the next one is known.

    A large one that is wanted, by the length that it states, is made a picture before the next one is decoded: beside
    a picture of 100 MB the decoder then need not have room for one frame more, which it would keep.
    """
    zero: Fraction | None = None
    waiting: Timed[_Held] | None = None
    while True:
        if waiting is not None and waiting.time is not None and zero is not None and waiting.item.large:
            start = waiting.time - zero
            stop = frames_before(start + (waiting.length or interval))
            if any(k % step == 0 for k in range(frames_before(start), stop)):
                waiting.item.make()
        picture = next(pictures, None)
        if picture is None:
            return
        zero = (picture.time or Fraction(0)) if zero is None else zero
        waiting = picture._replace(item=_Held(picture.item, uprighter))
        del picture
        yield waiting


class _Uprighter:
    """RGB pictures of the frames of one stream, at the size that the first one gives."""

    def __init__(self, stream: Any, max_side: int | None) -> None:
        self._stream, self._max_side = stream, max_side
        self._colours = Colours()
        self._size: tuple[int, int] | None = None

    def size(self, frame: Any) -> tuple[int, int]:
        """(width, height) before rotation; the first frame that comes decides."""
        self._size = self._size or _display_size(frame, self._stream, self._max_side)
        return self._size

    def picture(self, frame: Any) -> Pixels:
        """The frame turned upright, [H,W,3]. Raises ColourError."""
        picture = self._colours.picture(frame, self.size(frame))
        turns = _quarter_turns(frame)
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


class _Held:
    """A decoded frame, or the picture that was made of it."""

    def __init__(self, frame: Any, uprighter: _Uprighter) -> None:
        uprighter.size(frame)
        self.large = frame.width * frame.height >= LARGE
        self._frame, self._uprighter = frame, uprighter
        self._picture: Pixels | None = None

    def make(self) -> None:
        """Turn the frame into its picture. Raises ColourError."""
        self._picture, self._frame = self._uprighter.picture(self._frame), None

    def take(self, again: bool = False) -> Pixels:
        """The picture [H,W,3]; it is held here no more unless it is to be taken `again`. Raises ColourError."""
        picture = self._uprighter.picture(self._frame) if self._picture is None else self._picture
        self._picture, self._frame = picture if again else None, None
        return picture


def _display_size(frame: Any, stream: Any, max_side: int | None) -> tuple[int, int]:
    """(width, height) with square pixels, before rotation, shrunk to `max_side`."""
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    width, height = Fraction(frame.width) * (ratio if ratio > 0 else 1), Fraction(frame.height)
    shrink = min(Fraction(1), Fraction(max_side) / max(width, height)) if max_side else Fraction(1)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _quarter_turns(frame: Any) -> int:
    return round(frame.rotation / 90) % 4
