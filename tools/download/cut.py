"""Cutting a span out of a video file and cropping it: H.264 and AAC in mp4, at the rates of the source.

A picture belongs to the span [start, end) when its presentation time does. The first one becomes time zero of the clip,
for the sound as well, so that picture and sound keep their offset. Pixels are copied, not scaled; those of interlaced
pictures are made whole before, as a crop knows nothing of fields.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dualforce.codecs import media
from dualforce.codecs.media.interlaced import FieldsError, Progressive, check_whole
from dualforce.codecs.media_clock import Timed
from dualforce.types import FPS
from tools.download.reasons import ClipFailure, Reason
from tools.download.records import Box, CropRule

TICK = Fraction(1, 90_000)  # time unit of the clips, seconds
MAX_MISSING = Fraction(1)  # seconds at either end, or between two pictures, that a clip may lack
LEAD = Fraction(1)  # seconds decoded before the span: decoders of sound need a start
OVERRUN = Fraction(2)  # seconds read behind the span in search of its last sound
MAX_JITTER = Fraction(1, 50)  # seconds a sound block may lie off the running clock before it counts as a hole
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
MAX_RATE = 48_000  # samples a second; AAC takes no more than 96000, and nobody hears it


@dataclass(frozen=True)
class Span:
    """[start, end) in seconds of the file's own time."""

    start: Fraction
    end: Fraction


@dataclass(frozen=True)
class CutInfo:
    """What a clip holds. `seconds` from the first picture to the end of the last; `sound_gap`: seconds of silence put
    where the source has no sound, None without a sound stream."""

    frames: int
    seconds: float
    width: int
    height: int
    sound_gap: float | None


def cut(source: Path, target: Path, span: Span, rule: CropRule) -> CutInfo:
    """Write the span of `source`, cropped by `rule`, to `target`. Raises ClipFailure, and OSError if it cannot be
    written."""
    try:
        with media.opened(source) as read, media.opened(target, "w") as written:
            cutter = _Cutter(read, written, span, rule)
            cutter.run()
            return cutter.finish()
    except media.MediaError as error:
        code = getattr(error.__cause__, "errno", None)
        if code in DISK_ERRORS:
            raise OSError(code, os.strerror(code), str(target)) from None
        # Both files are open here, so the words "read" and "write" of the cause may name the wrong one.
        raise ClipFailure(Reason.DECODE, error.cause.partition(": ")[2] or error.cause) from None


class _Cutter:
    """One pass over the packets of a file; sound that comes before the first picture of the span waits for it."""

    def __init__(self, read: Any, written: Any, span: Span, rule: CropRule) -> None:
        self.read, self.written, self.span, self.rule = read, written, span, rule
        if not read.streams.video:
            raise ClipFailure(Reason.DECODE, "no video stream")
        self.video = read.streams.best("video")
        self.video.thread_type = "AUTO"
        self.audio = read.streams.best("audio")
        # Times are rounded to the container's own tick: half a tick early still counts as on time.
        self.slack = min(Fraction(self.video.time_base) / 2, Fraction(1, 1000))
        self.whole = Progressive()
        self.pictures: _Pictures | None = None
        self.sound: _Sound | None = None
        if self.audio is not None:
            self.sound = _Sound(written, self.audio)
        self.pending: list[Any] = []
        self.picture_end = self.sound_end = False

    def run(self) -> None:
        """Write what lies in the span."""
        if self.span.start > LEAD:
            self.read.seek(int((self.span.start - LEAD) * 1_000_000))
        streams = [self.video] if self.audio is None else [self.video, self.audio]
        for packet in self.read.demux(streams):
            for frame in packet.decode():
                if packet.stream.type == "video":
                    self._decoded(frame)
                else:
                    self._sound(frame)
            if self.picture_end and (self.sound_end or self.audio is None):
                return
        self._show(self.whole.rest())

    def finish(self) -> CutInfo:
        """Flush both encoders. Raises ClipFailure when too much of the span is missing."""
        pictures = self.pictures
        if pictures is None:
            raise ClipFailure(Reason.LENGTH, f"no picture between {self._shown()}")
        missing = max(pictures.zero - self.span.start, self.span.end - pictures.stop)
        if missing > MAX_MISSING:
            raise ClipFailure(Reason.LENGTH, f"{float(missing):.2f} s are missing of {self._shown()}")
        gap = None
        if self.sound is not None:
            gap = self.sound.finish(min(self.span.end, pictures.stop) - pictures.zero)
        return pictures.finish(gap)

    def _decoded(self, frame: Any) -> None:
        try:
            check_whole(frame, self.video.codec_context.name)
        except FieldsError as error:
            raise ClipFailure(Reason.DECODE, str(error)) from None
        self._show(self.whole.feed(Timed(frame, _time(frame), None)))

    def _show(self, pictures: Iterable[Timed[Any]]) -> None:
        for picture in pictures:
            if picture.time is not None:  # `_time` has seen to it
                self._picture(picture.item, picture.time)

    def _picture(self, frame: Any, time: Fraction) -> None:
        if time < self.span.start - self.slack:
            return
        if time >= self.span.end - self.slack:
            self.picture_end = True
            # A file whose sound ends early is not read to its end for it.
            self.sound_end |= time > self.span.end + OVERRUN
            return
        if self.pictures is None:
            self.pictures = _Pictures(self.written, self.video, frame, time, self.rule)
            for block in self.pending:
                self._sound(block)
            self.pending = []
        self.pictures.add(frame, time)

    def _sound(self, frame: Any) -> None:
        time = _time(frame)
        if time >= self.span.end:
            self.sound_end = True
        elif self.pictures is None:
            if time + LEAD >= self.span.start:
                self.pending.append(frame)
        elif self.sound is not None:
            self.sound.add(frame, time - self.pictures.zero, self.span.end - self.pictures.zero)

    def _shown(self) -> str:
        return f"{float(self.span.start):.2f}..{float(self.span.end):.2f} s"


class _Pictures:
    """The picture stream of a clip."""

    def __init__(self, written: Any, source: Any, first: Any, time: Fraction, rule: CropRule) -> None:
        if first.rotation:
            raise ClipFailure(Reason.DECODE, f"pictures are turned by {first.rotation} degrees: expected upright ones")
        box = rule.box(first.width, first.height)
        if box is None:
            raise ClipFailure(Reason.CROP, f"the crop lies outside the picture of {first.width} x {first.height}")
        self.written, self.box, self.size = written, box, (first.width, first.height)
        rate = source.average_rate or Fraction(FPS)
        self.interval = 1 / Fraction(rate)
        self.stream = written.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "medium"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = box.width, box.height, "yuv420p"
        context, given = self.stream.codec_context, source.codec_context
        context.time_base = TICK
        context.color_range, context.colorspace = first.color_range, first.colorspace
        context.color_primaries, context.color_trc = given.color_primaries, given.color_trc
        if source.sample_aspect_ratio:
            context.sample_aspect_ratio = source.sample_aspect_ratio
        self.zero = self.last = time
        self.count = 0

    @property
    def stop(self) -> Fraction:
        """When the last picture ends, in seconds of the source's time."""
        return self.last + self.interval

    def add(self, frame: Any, time: Fraction) -> None:
        """Encode one picture; one whose time does not advance is dropped. Raises ClipFailure at a hole."""
        if self.count and time <= self.last:
            return
        if time - self.last > MAX_MISSING:
            raise ClipFailure(
                Reason.HOLE, f"no picture for {float(time - self.last):.2f} s at {float(self.last):.2f} s"
            )
        if (frame.width, frame.height) != self.size:
            raise ClipFailure(Reason.DECODE, "the pictures change their size")
        picture = crop_picture(frame, self.box)
        picture.time_base, picture.pts = TICK, round((time - self.zero) / TICK)
        self.written.mux(self.stream.encode(picture))
        self.last, self.count = time, self.count + 1

    def finish(self, sound_gap: float | None) -> CutInfo:
        """Write what the encoder still holds."""
        self.written.mux(self.stream.encode(None))
        seconds = float(self.stop - self.zero)
        return CutInfo(self.count, seconds, self.box.width, self.box.height, sound_gap)


class _Sound:
    """The sound stream of a clip: one run of samples from time zero on; silence fills the holes."""

    def __init__(self, written: Any, source: Any) -> None:
        self.written = written
        self.rate = source.rate
        stereo = source.codec_context.channels > 1
        self.stream = written.add_stream("aac", rate=min(self.rate, MAX_RATE), layout="stereo" if stereo else "mono")
        self.stream.bit_rate = 192_000 if stereo else 128_000
        self.position = self.silent = 0
        self.like: Any = None

    def add(self, frame: Any, time: Fraction, limit: Fraction) -> None:
        """Encode the samples of a block that starts at `time`, up to `limit` (seconds of the clip's time)."""
        self.like = frame
        first = round(time * self.rate)
        if self.position and abs(first - self.position) <= MAX_JITTER * self.rate:
            first = self.position
        if first > self.position:
            self._silence(min(first, round(limit * self.rate)))
        begin = self.position - first
        stop = min(frame.samples, round(limit * self.rate) - first)
        if begin < stop:
            self._encode(_samples(frame)[:, begin:stop])

    def finish(self, length: Fraction) -> float:
        """Fill up to `length` seconds and flush; returns the seconds of silence that were put in."""
        if self.like is None:
            return float(length)
        self._silence(round(length * self.rate))
        self.written.mux(self.stream.encode(None))
        return self.silent / self.rate

    def _silence(self, stop: int) -> None:
        block = _samples(self.like)[:, :1]
        # u8 samples are silent at 128; every other format is at 0.
        level = 128 if block.dtype == np.uint8 else 0
        while self.position < stop:
            count = min(stop - self.position, self.rate)
            self.silent += count
            self._encode(np.full((len(block), count), level, block.dtype))

    def _encode(self, samples: np.ndarray) -> None:
        """Encode [channels,samples]."""
        packed = not self.like.format.is_planar
        data = np.ascontiguousarray(samples.T.reshape(1, -1) if packed else samples)
        frame = self.like.from_ndarray(data, format=self.like.format.name, layout=self.like.layout.name)
        frame.sample_rate, frame.time_base, frame.pts = self.rate, Fraction(1, self.rate), self.position
        self.position += samples.shape[1]
        self.written.mux(self.stream.encode(frame))


def _samples(frame: Any) -> np.ndarray:
    """The samples of a block as [channels,samples]."""
    data = frame.to_ndarray()
    return data if frame.format.is_planar else data.reshape(-1, len(frame.layout.channels)).T


def crop_picture(frame: Any, box: Box) -> Any:
    """The part of a decoded picture that lies in `box`, as a picture of 8 bits with half the colour resolution."""
    if frame.format.name != "yuv420p":
        frame = frame.reformat(format="yuv420p")
    planes = []
    for plane, share in zip(frame.planes, (1, 2, 2), strict=True):
        pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        y, x = box.y // share, box.x // share
        planes.append(pixels[y : y + box.height // share, x : x + box.width // share].ravel())
    picture = frame.from_ndarray(np.concatenate(planes).reshape(-1, box.width), format="yuv420p")
    picture.color_range, picture.colorspace = frame.color_range, frame.colorspace
    return picture


def _time(frame: Any) -> Fraction:
    """Presentation time in seconds. Raises ClipFailure where the file gives none."""
    if frame.pts is None:
        raise ClipFailure(Reason.DECODE, "a picture or sound block without presentation time")
    return frame.pts * Fraction(frame.time_base)
